"""The bands as registered PyTorch operators: schema, fake tensors, autograd. Glue only; the arithmetic is in band.py.

Registered operators are opaque to torch.compile, so a graph holds one node a band whatever the lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pi_attention.ops.blocked.band import band_backward as eager_band_backward
from pi_attention.ops.blocked.band import band_forward
from pi_attention.ops.checks import check_softcap
from pi_attention.ops.fusion import compute_dtype
from pi_attention.pattern import PiPattern


@torch.library.custom_op("pi_attention::band", mutates_args=())
def band(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    pattern: list[int],
    skip: bool,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One band of the encoded pattern: see `band.band_forward`. The soft cap of a compiled graph is checked here."""
    softcap = check_softcap(softcap)
    return band_forward(query, key, value, starts, PiPattern.from_ints(pattern), skip, scale, softcap)


@band.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(query.dtype)
    return query.new_empty(query.shape, dtype=dtype), query.new_empty(query.shape[:3], dtype=dtype)


@torch.library.custom_op("pi_attention::band_backward", mutates_args=())
def band_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    starts: Tensor | None,
    pattern: list[int],
    skip: bool,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one band: see `band.band_backward`."""
    return eager_band_backward(
        grad_out, grad_lse, query, key, value, out, starts, PiPattern.from_ints(pattern), skip, scale, softcap
    )


@band_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_band(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, starts, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, starts, *output)


def _differentiate_band(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    query, key, value, starts, out, lse = ctx.saved_tensors
    grad_lse = torch.where(lse == -torch.inf, 0.0, grad_lse)  # a query without keys has no gradient, not NaN
    grads = band_backward(grad_out, grad_lse, query, key, value, out, starts, *ctx.rest)
    return *grads, None, None, None, None, None


torch.library.register_autograd("pi_attention::band", _differentiate_band, setup_context=_save_band)


def _save_band_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, pattern, skip, scale, softcap = inputs
    ctx.rest = pattern, skip, scale, softcap
    ctx.save_for_backward(*tensors)


def _differentiate_band_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """Double backward: run the plain PyTorch backward again under autograd, and differentiate that.

    Where a graph is asked for, the inputs are views of the saved tensors, through which further derivatives go on.
    Views, because saved tensors depend on one another, and here each is an input of its own.
    """
    *tensors, starts = ctx.saved_tensors
    further = torch.is_grad_enabled()
    inputs = [x.view_as(x) if further and x.requires_grad else x.detach().requires_grad_() for x in tensors]
    rest: tuple[Any, ...] = (starts, PiPattern.from_ints(ctx.rest[0]), *ctx.rest[1:])
    with torch.enable_grad():
        outputs = eager_band_backward(*inputs, *rest)
    if not any(x.requires_grad for x in outputs):  # no query has a key in this band
        return (None,) * (len(inputs) + 1 + len(ctx.rest))
    found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True, create_graph=further)
    return *found, None, *[None] * len(ctx.rest)


torch.library.register_autograd(
    "pi_attention::band_backward", _differentiate_band_backward, setup_context=_save_band_backward
)
