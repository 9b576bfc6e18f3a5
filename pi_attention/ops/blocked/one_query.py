"""One query against its keys: a decoding step needs plain slices of the keys, not a layout."""

from __future__ import annotations

import torch
from torch import Tensor

from pi_attention.ops.scores import soft_cap
from pi_attention.pattern import Band


def band_of_one_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    band: Band,
    first_key: int,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of the last query over the keys at the lags of a causal band.

    Args:
        query: [B, H, 1, D], scaled, fp32 or fp64; key, value: [B, G, S, D]; starts: [B, S] from `segment_starts`.
        first_key: keys of the segment before it are hidden (the sinks, in the skip band).

    Returns:
        out [B, H, 1, D] and log-sum-exp [B, H, 1]; 0 and −inf without a key.
    """
    last = key.shape[2] - 1
    groups = key.shape[1]
    lags = band.within(key.shape[2]).lags()
    lags = range(lags.start, min(lags.stop, last - first_key + 1), band.stride)  # exact without segments
    if not lags:
        return torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf)
    seen = slice(last - lags[-1], last - lags[0] + 1, band.stride)
    query = query.unflatten(1, (groups, -1)).squeeze(3)  # [B, G, heads, D]
    scores = query @ key[:, :, seen].to(query.dtype).transpose(-1, -2)  # [heads, D] @ [D, n] -> [heads, n]
    scores = soft_cap(scores, softcap)
    empty = None
    if starts is not None:
        own = starts[:, -1:]
        position = torch.arange(seen.start, seen.stop, band.stride, device=key.device)
        hidden = ((starts[:, seen] != own) | (own < 0) | (position - own < first_key))[:, None, None]
        empty = hidden.all(dim=-1, keepdim=True)
        scores = scores.masked_fill(hidden & ~empty, -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    if empty is not None:
        weights, lse = weights.masked_fill(empty, 0.0), lse.masked_fill(empty[..., 0], -torch.inf)
    out = weights @ value[:, :, seen].to(query.dtype)  # [heads, n] @ [n, D] -> [heads, D]
    return out.flatten(1, 2)[:, :, None], lse.flatten(1, 2)[..., None]
