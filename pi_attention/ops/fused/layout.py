"""How results lie in memory: as the tensors that they belong to, so that a layer need not copy them.

The rows of [B, H, T, D] lie head by head, or token by token: as [B, T, H, D], which is what a projection writes.
Gradients of a pattern with skips lie head by head: their rows are written a period apart, and token by token the rows
of one tile would spread over H times as much memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def by_token(strides: tuple[Any, ...]) -> bool:
    """Whether the rows of a tensor [B, H, T, D] of these strides lie token by token."""
    nearer = strides[1] < strides[2]
    if isinstance(nearer, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # loads sympy

        return guard_or_false(nearer)
    return nearer


def dense_strides(shape: tuple[int, ...], by_token: bool) -> tuple[int, ...]:
    """Those of a dense tensor [B, H, T, D] whose rows lie token by token, or head by head."""
    _, heads, length, dim = shape
    of_batch = heads * length * dim
    return (of_batch, dim, heads * dim, 1) if by_token else (of_batch, length * dim, dim, 1)


def empty_as(x: Tensor) -> Tensor:
    """Contiguous memory like x; `empty_like` takes half the host time of `empty`."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty(*x.shape, dtype=x.dtype, device=x.device)


def empty_result(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same with these strides."""
    if x.stride() == strides:
        return torch.empty_like(x)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor itself where it has these strides, else a copy that has them: hooks may move what autograd saves."""
    return x if x.stride() == strides else empty_result(x, strides).copy_(x)
