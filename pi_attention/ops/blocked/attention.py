"""π-Attention in plain PyTorch, linear in the length in time and memory: the CPU path, which runs on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from pi_attention.ops.blocked.functional import differentiable_band
from pi_attention.ops.blocked.operator import band as registered_band
from pi_attention.ops.fusion import beside_gate, fuse_bands, without_sink
from pi_attention.ops.sinks import join_sinks
from pi_attention.ops.transforms import transforming
from pi_attention.pattern import PiPattern


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: PiPattern,
    *,
    gate: Tensor | None,
    fusion: str,
    starts: Tensor | None,
    scale: float,
    sink_logit: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, T, D], lse_local and lse_skip [B, H, T]; arguments as in `pi_attention`."""
    band = differentiable_band if transforming() else registered_band
    local, lse_local = band(query, key, value, starts, pattern.to_ints(), False, scale, softcap)
    if pattern.sinks:
        local, lse_local = join_sinks(local, lse_local, query, key, value, starts, pattern, scale, softcap)
    if pattern.skips == 0:
        local = without_sink(local, lse_local, sink_logit)
        return beside_gate(local.to(query.dtype), gate), lse_local, torch.full_like(lse_local, -torch.inf)
    skip, lse_skip = band(query, key, value, starts, pattern.to_ints(), True, scale, softcap)
    out = fuse_bands(local, skip, lse_local, lse_skip, gate, fusion, sink_logit)
    return out.to(query.dtype), lse_local, lse_skip
