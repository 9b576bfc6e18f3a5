"""The training loop of the experiments: many short runs of small models, where a Trainer's set-up would count."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pi_attention.models.modeling_pi import PiDecoderLayer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EAGER = 3
"""Steps before a CUDA graph of the step is captured."""
RECOMPILATIONS = 256
"""Most shapes and patterns of one process."""

Batch = dict[str, Tensor]


def products() -> torch.autocast:
    """bf16 products on a GPU, fp32 on a CPU."""
    # a cache of cast weights would outlive the capture of a graph
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda", cache_enabled=False)


def moved(batch: Batch) -> Batch:
    """A batch on the device; copied while the host makes the next one."""
    if DEVICE.type == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
    return {name: value.to(DEVICE, non_blocking=True) for name, value in batch.items()}


def segments(present: Tensor) -> Tensor:
    """Segment ids [B, T] of padded rows, which need no look at the data as a mask does."""
    return torch.where(present, 0, -1).to(torch.int32)


def rate_at(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over a tenth of the steps, then cosine decay to zero."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def parts_to_compile(model: nn.Module) -> list[nn.Module]:
    """Our layers; of a model of transformers, the norms and feed-forward networks, which are alike in all layers."""
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, PiDecoderLayer)]
    return layers or [module for module in model.modules() if type(module).__name__.endswith(("RMSNorm", "MLP"))]


@contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """What a GPU computes by many small kernels is compiled while the model trains: once for all layers and seeds."""
    parts = parts_to_compile(model) if DEVICE.type == "cuda" else []
    for part in parts:
        part.compile(dynamic=False)
    try:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS):
            yield
    finally:
        for part in parts:
            part._compiled_call_impl = None


def captured(update: Callable[[Batch], Tensor], example: Batch) -> Callable[[Batch], Tensor]:
    """`update` as a CUDA graph for batches of one shape: a step of a small model is bound by the host otherwise."""
    inputs = {name: value.clone() for name, value in example.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = update(inputs)

    def replay(batch: Batch) -> Tensor:
        for name, value in batch.items():
            inputs[name].copy_(value)
        graph.replay()
        return result

    return replay


@dataclass
class Pace:
    """How fast the steps of `fit` are, once everything is compiled."""

    after: int = 20
    """Steps that do not count."""
    begun: float = math.nan
    steps_a_second: float = math.nan

    def note(self, steps: int) -> None:
        """So many steps were asked for."""
        if steps == self.after:
            self.begun = now()
        elif steps > self.after:
            self.steps_a_second = (steps - self.after) / (now() - self.begun)


def now() -> float:
    """The time when the device has done everything so far."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def fit(model: nn.Module, batches: Iterator[Batch], *, steps: int, rate: float, pace: Pace | None = None) -> float:
    """Train in place and return the last step's loss.

    AdamW with weight decay 0.1 on matrices, the schedule of `rate_at`, gradients clipped to norm 1.

    Args:
        model: on the device; called with a batch as keyword arguments, returns an object with `loss`; no
            synchronisation with the host.
        batches: at least `steps` of them, all of one shape.
        steps: optimizer steps.
        rate: peak learning rate.
        pace: notes the steps a second.
    """
    model.train()
    cuda = DEVICE.type == "cuda"
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    peak = torch.tensor(rate, device=DEVICE) if cuda else rate
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=cuda, capturable=cuda)

    def update(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        with products():
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.detach()

    step = update
    loss = torch.tensor(math.nan)
    stream = torch.cuda.Stream() if cuda else None  # what is captured must not have run on the default stream before
    with compiled(model):
        for number in range(steps):
            if pace is not None and number == pace.after:
                pace.note(number)
            for group in optimizer.param_groups:
                if cuda:
                    group["lr"].fill_(rate * rate_at(number, steps))
                else:
                    group["lr"] = rate * rate_at(number, steps)
            batch = moved(next(batches))
            if cuda and number < EAGER:
                torch.cuda.synchronize()
                with torch.cuda.stream(stream):
                    loss = update(batch)
                torch.cuda.synchronize()
                continue
            if cuda and number == EAGER:
                optimizer.zero_grad()
                step = captured(update, batch)
            loss = step(batch)
        if pace is not None:
            pace.note(steps)
    model.eval()
    return loss.item()


def shares(settings: dict[str, Any]) -> dict[int, float]:
    """The share of training at each length: half at the first of those "shorter first", the rest split evenly."""
    first, *others = [*settings.get("shorter first", []), settings["context"]]
    return {first: 0.5} | dict.fromkeys(others, 0.5 / len(others)) if others else {first: 1.0}


def steps_by_length(settings: dict[str, Any]) -> dict[int, int]:
    """The steps of the settings, by their shares."""
    return {length: round(share * settings["steps"]) for length, share in shares(settings).items()}


def fit_by_length(
    model: nn.Module, batches: Callable[[int], Iterator[Batch]], steps: dict[int, int], *, rate: float
) -> tuple[float, float]:
    """Train in place at one length after the other, each with a schedule of its own.

    Args:
        model: as in `fit`.
        batches: those of a length.
        steps: of each length, in the order of training.
        rate: peak learning rate of every length.

    Returns:
        Loss of the last step, and steps a second at the last length; NaN where these were too few to tell.
    """
    pace = Pace()
    for length, count in steps.items():
        pace = Pace()
        last = fit(model, batches(length), steps=count, rate=rate, pace=pace)
    return last, pace.steps_a_second


PROBED = 100
"""Steps by which the speed is known."""


def steps_within(model: nn.Module, batches: Iterator[Batch], seconds: float) -> int:
    """How many steps of training take so many seconds; the model stays as it is."""
    pace = Pace()
    fit(model, batches, steps=pace.after + PROBED, rate=0.0, pace=pace)
    return max(1, round(seconds * pace.steps_a_second))
