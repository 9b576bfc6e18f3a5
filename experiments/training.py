"""The training loop of the experiments: many short runs of small models, where a Trainer's set-up would count."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def products() -> torch.autocast:
    """bf16 products on a GPU, fp32 on a CPU."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda")


def moved(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch on the device."""
    return {name: value.to(DEVICE) for name, value in batch.items()}


def fit(model: nn.Module, batches: Iterator[dict[str, Tensor]], *, steps: int, rate: float) -> float:
    """Train in place and return the last step's loss.

    AdamW with weight decay 0.1 on matrices, a tenth of the steps of linear warm-up, cosine decay to zero, gradients
    clipped to norm 1.

    Args:
        model: on the device; called with a batch as keyword arguments, returns an object with `loss`.
        batches: at least `steps` of them.
        steps: optimizer steps.
        rate: peak learning rate.
    """
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=DEVICE.type == "cuda")
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
    loss = torch.tensor(float("nan"))
    for _ in range(steps):
        with products():
            loss = model(**moved(next(batches))).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()
