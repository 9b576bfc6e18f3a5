"""AdamW of a run, its rate as a function of the step, and the clipping of gradients that may lie on many ranks."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
import torch.distributed as dist
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
    """Scale all gradients so that their norm over all ranks is at most `most`; the norm before, a scalar.

    Whatever meshes the gradients lie on, the ranks exchange one number: all of the default group call, and no gradient
    is a partial sum.
    """
    parameters = list(parameters)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(grad, DTensor) for grad in grads):
        return nn.utils.clip_grad_norm_(parameters, most)
    of_share: dict[float, list[Tensor]] = {}
    for grad in grads:
        of_share.setdefault(_share(grad), []).append(grad.to_local() if isinstance(grad, DTensor) else grad)
    squares = torch.stack([share * nn.utils.get_total_norm(part) ** 2 for share, part in of_share.items()]).sum()
    dist.all_reduce(squares)
    norm = squares.sqrt()
    torch._foreach_mul_([grad for part in of_share.values() for grad in part], (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _share(grad: Tensor) -> float:
    """The part of a gradient's square that each rank counts, so that all ranks together count it once."""
    pieces = 1
    if isinstance(grad, DTensor):
        sizes = zip(grad.placements, grad.device_mesh.shape, strict=True)
        pieces = prod(size for placement, size in sizes if not placement.is_replicate())
    return pieces / dist.get_world_size()
