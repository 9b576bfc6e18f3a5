"""One band in operations that PyTorch differentiates in every mode: forward mode and the transforms of torch.func.

The registered operators have reverse mode alone, and PyTorch takes the tangent of an operator without a forward rule
for zero without a word. So while forward mode or a transform is active, the blocked implementation computes its bands
here: without writing in place, in O(T · keys of the band · D) memory, or O(T · S) where that is less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pi_attention.ops.blocked.rows import PADDING_QUERY
from pi_attention.ops.fusion import compute_dtype
from pi_attention.ops.scores import soft_cap
from pi_attention.pattern import Band, PiPattern


def differentiable_band(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    pattern: list[int],
    skip: bool,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a band, as of `operator.band`, whose arguments it takes."""
    shape = PiPattern.from_ints(pattern)
    dtype = compute_dtype(query.dtype)
    share = query.shape[1] // key.shape[1]
    key, value = (x.to(dtype).repeat_interleave(share, dim=1) for x in (key, value))
    query = query.to(dtype) * scale
    bands = shape.skip_bands() if skip else (shape.local_band,)
    if len(set(bands)) == 1:
        return _attend(query, key, value, starts, shape, bands[0], skip, softcap)
    heads = zip(*(x.split(1, dim=1) for x in (query, key, value)), bands, strict=True)
    of_heads = [_attend(q, k, v, starts, shape, band, skip, softcap) for q, k, v, band in heads]
    outs, lses = zip(*of_heads, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    pattern: PiPattern,
    band: Band,
    skip: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over a band of distances; query [B, H, T, D] scaled, key and value [B, H, S, D]."""
    queries, length, dim = query.shape[2], key.shape[2], query.shape[3]
    sides = pattern.signed_bands(band, length)
    lags = [lag for side in sides for lag in side.lags()]
    position = torch.arange(length - queries, length, device=query.device)[:, None]
    dense = len(lags) * dim >= length
    if dense:
        index = torch.arange(length, device=query.device).expand(queries, -1)  # [T, S]
        lag = position - index
        turns = (-length, 0, length) if pattern.ring else (0,)
        visible = torch.zeros_like(lag, dtype=torch.bool)
        for side in sides:
            for turn in turns:
                visible = visible | side.contains(lag + turn)
    else:
        index = position - torch.tensor(lags, dtype=torch.long, device=query.device)  # [T, n]
        index = index % length if pattern.ring else index
        visible = (index >= 0) & (index < length)
        index = index.clamp(0, length - 1)
    visible = visible[None, None]
    sinks = pattern.sinks if skip else 0  # sinks belong to the local band alone
    if starts is not None:
        own = starts[:, length - queries :, None]
        of_key = starts[:, index]  # [B, T, n]
        same = of_key == torch.where(own < 0, PADDING_QUERY, own)
        visible = visible & (same & (index - of_key >= sinks))[:, None]
    elif sinks:
        visible = visible & (index >= sinks)
    # [T, D] @ [D, S] -> [T, S], or [T, 1, D] · [T, n, D] -> [T, n]
    scores = query @ key.transpose(-1, -2) if dense else (query[..., None, :] * key[:, :, index]).sum(dim=-1)
    scores = soft_cap(scores, softcap)
    empty = ~visible.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~visible, -torch.inf).masked_fill(empty, 0.0)
    weights = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)
    out = weights @ value if dense else (weights[..., None] * value[:, :, index]).sum(dim=-2)
    return out, torch.logsumexp(scores, dim=-1).masked_fill(empty[..., 0], -torch.inf)
