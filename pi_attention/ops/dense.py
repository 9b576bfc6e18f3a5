"""The case where the window covers every key: ordinary attention, by PyTorch's own kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pi_attention.masks import dense_masks
from pi_attention.pattern import PiPattern

LONGEST = 1 << 31
"""No sequence is as long: starts of segments are int32."""
MASKED = 1 << 25
"""Elements of a causal mask that exist at a time, where nothing is compiled or differentiated."""


def covers_everything(pattern: PiPattern, key_length: int) -> bool:
    """True when the local band of each query holds all the keys that it may see, so that no skip key is left.

    Exported for any length, only when it does for all of them: a program has no branch on the length.
    """
    covers: Any = pattern.window >= key_length
    if isinstance(covers, torch.SymBool) and torch.compiler.is_exporting():
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy

        return pattern.window >= LONGEST or statically_known_true(covers)
    return bool(covers)


def needs_mask(query: Tensor, key: Tensor, pattern: PiPattern, starts: Tensor | None) -> bool:
    """Whether PyTorch's kernels take a mask for the call, which makes them several times as slow."""
    length = query.shape[2]
    return starts is not None or (pattern.causal and length != 1 and length != key.shape[2])


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: PiPattern, starts: Tensor | None, scale: float
) -> Tensor:
    """out [B, H, T, D] by `scaled_dot_product_attention`, for a pattern that `covers_everything`."""
    out = _attend(query, key, value, pattern, starts, scale)
    if torch.compiler.is_compiling() or not out.requires_grad:  # a compiled call refuses second derivatives itself
        return out
    differentiable: Tensor = _Differentiable.apply(out, query, key, value, pattern, starts, scale)
    return differentiable


def _attend(
    query: Tensor, key: Tensor, value: Tensor, pattern: PiPattern, starts: Tensor | None, scale: float
) -> Tensor:
    length, key_length = query.shape[2], key.shape[2]
    if not needs_mask(query, key, pattern, starts):
        causal, grouped = pattern.causal and _known(length == key_length), _grouped(query, key)
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)
    differentiable = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if differentiable or not pattern.causal or torch.compiler.is_compiling():
        return _masked(query, key, value, pattern, starts, scale)
    rows = max(1, MASKED // (query.shape[0] * key_length))
    outs = []
    for begin in range(0, length, rows):  # some queries, and the keys up to the last of them
        part = query[:, :, begin : begin + rows]
        seen = key_length - length + begin + part.shape[2]
        ids = None if starts is None else starts[:, :seen]
        outs.append(_masked(part, key[:, :, :seen], value[:, :, :seen], pattern, ids, scale))
    return torch.cat(outs, dim=2) if outs[1:] else outs[0]


def _masked(
    query: Tensor, key: Tensor, value: Tensor, pattern: PiPattern, starts: Tensor | None, scale: float
) -> Tensor:
    visible, _ = dense_masks(pattern, query.shape[2], key.shape[2], starts=starts, device=query.device)
    empty = ~visible.any(dim=-1, keepdim=True)
    grouped = _grouped(query, key)
    out = F.scaled_dot_product_attention(query, key, value, visible | empty, scale=scale, enable_gqa=grouped)
    return out.masked_fill(empty, 0.0)


def _grouped(query: Tensor, key: Tensor) -> bool:
    return _known(query.shape[1] != key.shape[1])


def _known(condition: Any) -> bool:
    """A comparison of sizes as a bool: in a compiled call it may be a symbol, on which a branch decides."""
    if condition:  # noqa: SIM103
        return True
    return False


class _Differentiable(torch.autograd.Function):
    """The output as it is; where a graph of its gradient is asked for, that of attention by plain products.

    The backward passes of PyTorch's fused attention kernels have no derivative.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, query: Tensor, key: Tensor, value: Tensor, pattern: PiPattern, starts: Any, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, starts)
        ctx.pattern, ctx.scale = pattern, scale
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grad, None, None, None, None, None, None
        *tensors, starts = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]
        # views, as one may be made from another
        query, key, value = inputs = [x.view_as(x) if x.requires_grad else x for x in tensors]
        with sdpa_kernel(SDPBackend.MATH):
            out = _attend(query, key, value, ctx.pattern, starts, ctx.scale)
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        return None, *(next(found) if need else None for need in needed), None, None, None
