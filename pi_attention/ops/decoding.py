"""The decoding kernels as a registered PyTorch operator: a few new queries, no gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pi_attention.pattern import PiPattern

MAX_QUERIES = 16
MAX_ROWS = 64
"""Query rows of a program: the heads of a group times the queries."""


def is_decoding(query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, pattern: PiPattern) -> bool:
    """Whether the decoding kernels serve this call: few causal queries, and nothing to differentiate."""
    differentiable = query.requires_grad or key.requires_grad or value.requires_grad
    differentiable = differentiable or (gate is not None and gate.requires_grad)
    if not pattern.causal or (differentiable and torch.is_grad_enabled()):
        return False
    return query.shape[2] <= MAX_QUERIES and query.shape[1] // key.shape[1] * query.shape[2] <= MAX_ROWS


torch.library.define(
    "pi_attention::decode",
    "(Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? starts, int[] pattern, bool mass, float scale) "
    "-> (Tensor, Tensor, Tensor)",
)
decode = torch.ops.pi_attention.decode.default


@torch.library.impl("pi_attention::decode", ("cpu", "cuda"))
def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    starts: Tensor | None,
    pattern: list[int],
    mass: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, T, D] of the fused bands; log-sum-exps [B, H, T] of the local band with sinks, of the skip band."""
    from pi_attention.ops.triton.launch import launch_decode
    from pi_attention.ops.triton.plan import Launch

    return launch_decode(Launch(query, key, value, starts, PiPattern.from_ints(pattern), True, scale), gate, mass)


@torch.library.register_fake("pi_attention::decode")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    starts: Tensor | None,
    pattern: list[int],
    mass: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return query.new_empty(query.shape), lse, torch.empty_like(lse)
