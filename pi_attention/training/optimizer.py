"""AdamW of a run, its rate as a function of the step, and the clipping of gradients that may lie on many ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup

from pi_attention.training.config import OptimizerSettings


def adamw(model: nn.Module, settings: OptimizerSettings) -> AdamW:
    """AdamW over all parameters, in two groups: weights, which decay, then norms and biases, which do not."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups["norm" not in name and "bias" not in name].append(parameter)
    decays = {True: settings.weight_decay, False: 0.0}
    spread = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return AdamW(
        [{"params": members, "weight_decay": decays[decayed]} for decayed, members in groups.items() if members],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        **({"foreach": False} if spread else {"fused": True}),  # parameters may lie on different meshes
    )


def schedule_from(optimizer: AdamW, settings: OptimizerSettings, step: int) -> LRScheduler:
    """Linear warm-up and cosine decay, from a step on: a rate is a function of the step alone."""
    for group in optimizer.param_groups:
        group["initial_lr"] = settings.learning_rate
    return get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps, last_epoch=step - 1)


def clip_gradients(parameters: Iterable[Tensor], most: float) -> Tensor:
    """Scale all gradients so that their norm over all ranks is at most `most`; the norm before, a scalar."""
    parameters = list(parameters)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(grad, DTensor) for grad in grads):
        return nn.utils.clip_grad_norm_(parameters, most)
    # on different meshes, whose norms do not go into one tensor
    norms = [torch.linalg.vector_norm(grad) for grad in grads]
    norm = torch.stack([x.full_tensor() if isinstance(x, DTensor) else x for x in norms]).norm()
    for grad in grads:
        grad.mul_((most / (norm + 1e-6)).clamp(max=1.0))
    return norm
