"""The specification: π-Attention with dense masks, written to be read. Any dtype, any device, memory O(T·S).

No fast implementation imports this file; the tests measure all of them against it in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pi_attention.masks import dense_masks
from pi_attention.ops.fusion import fuse_bands
from pi_attention.ops.scores import soft_cap
from pi_attention.pattern import PiPattern


def band_reference(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the visible keys of one band.

    Args:
        query: [B, H, T, D]; key, value: [B, H, S, D]; visible: bool, broadcastable to [B, H, T, S].

    Returns:
        out [B, H, T, D], 0 where no key is visible; log-sum-exp [B, H, T], −inf there. Both in fp32 (fp64 for fp64
        inputs), in which everything is computed: a product of fp16 that is scaled later may overflow before.
    """
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key, value = (x.to(exact) for x in (query, key, value))
    scores = soft_cap((query * scale) @ key.transpose(-1, -2), softcap)  # [T, D] @ [D, S] -> [T, S]
    scores = scores.masked_fill(~visible, -torch.inf)
    empty = ~visible.any(dim=-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(empty, 0.0), dim=-1, keepdim=True)
    weights = torch.exp(scores - lse).masked_fill(~visible, 0.0)
    out = weights @ value  # [T, S] @ [S, D] -> [T, D]
    return out, lse.masked_fill(empty, -torch.inf).squeeze(-1)


def reference_attention(
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
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    local, skip = dense_masks(pattern, query.shape[2], key.shape[2], starts=starts, device=query.device)
    out_local, lse_local = band_reference(query, key, value, local, scale, softcap)
    out_skip, lse_skip = band_reference(query, key, value, skip, scale, softcap)
    out = fuse_bands(out_local, out_skip, lse_local, lse_skip, gate, fusion, sink_logit)
    return out.to(query.dtype), lse_local, lse_skip
