"""Sinks beside the kernels of a band: the first keys of a segment that lie beyond a query's window."""

from __future__ import annotations

import torch
from torch import Tensor

from pi_attention.ops.fusion import compute_dtype, fuse, gate_values
from pi_attention.ops.scores import soft_cap
from pi_attention.pattern import PiPattern


def sink_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    pattern: PiPattern,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the sinks of its segment that lie beyond its window.

    Shapes and dtypes as those of `band_forward`. In packed rows each query's sinks are gathered, which takes
    O(T · min(sinks, S) · D) of memory; elsewhere all queries share them.
    """
    heads, length, groups, key_length = query.shape[1], query.shape[2], key.shape[1], key.shape[2]
    dtype = compute_dtype(query.dtype)
    position = torch.arange(key_length - length, key_length, device=query.device)[:, None]
    if starts is None:
        key, value = (x[:, :, : pattern.sinks].to(dtype) for x in (key, value))  # [B, G, sinks, D]
        visible = torch.arange(key.shape[2], device=query.device) <= position - pattern.window  # [T, sinks]
        keys = "bgsd"
    else:
        start = starts[:, key_length - length :, None].long()
        sink = start + torch.arange(min(pattern.sinks, key_length), device=query.device)  # [B, T, sinks]
        visible = ((start >= 0) & (sink <= position - pattern.window))[:, None]
        sink = sink.clamp(0, key_length - 1)
        row = torch.arange(len(sink), device=query.device)[:, None, None]
        # indexing, whose backward pass is repeatable on a GPU, too
        key, value = (x.transpose(1, 2)[row, sink].movedim(3, 1).to(dtype) for x in (key, value))  # [B, G, T, sinks, D]
        keys = "bgtsd"

    query = query.to(dtype).unflatten(1, (groups, heads // groups)) * scale
    scores = soft_cap(torch.einsum(f"bghtd,{keys}->bghts", query, key).flatten(1, 2), softcap)
    empty = ~visible.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~visible, -torch.inf).masked_fill(empty, 0.0)
    weights = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)
    out = torch.einsum(f"bghts,{keys}->bghtd", weights.unflatten(1, (groups, -1)), value).flatten(1, 2)
    return out, torch.logsumexp(scores, dim=-1).masked_fill(empty[..., 0], -torch.inf)


def join_sinks(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    pattern: PiPattern,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, D] and log-sum-exp [B, H, T] of the window, with the sinks taken into its softmax."""
    out_sink, lse_sink = sink_attention(query, key, value, starts, pattern, scale, softcap)
    out = fuse(out, out_sink, gate_values(lse, lse_sink, None, "mass"))
    no_sink = lse_sink == -torch.inf
    return out, torch.where(no_sink, lse, torch.logaddexp(lse, lse_sink.masked_fill(no_sink, 0.0)))
