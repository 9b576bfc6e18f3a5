"""One band of π-Attention in plain PyTorch, forward and backward. It runs on every device and is tuned for CPUs.

Time and memory are O(T · keys of the band). Each block of C query rows meets one window of key rows (see rows.py)
in two small matrix products; chunks of blocks stay in cache. Scores and sums are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from pi_attention.ops.blocked.one_query import band_of_one_query
from pi_attention.ops.blocked.rows import (
    Rows,
    add_windows,
    give_blocks_back,
    give_rows_back,
    lay_out,
    take_blocks,
)
from pi_attention.ops.fusion import compute_dtype
from pi_attention.pattern import Band, PiPattern

PART_ELEMENTS = 1 << 20
"""Elements of the keys computed together: 4 MiB in fp32, so that the memory of what is made of them is reused."""


@dataclass(frozen=True)
class Part:
    """Query heads that share a band and are computed together: some rows of the batch, some heads."""

    band: Band
    rows: slice
    heads: slice | list[int]
    key_heads: slice | list[int]

    def queries(self, x: Tensor) -> Tensor:
        """The part's share of [B, H, ...]."""
        return x[self.rows, self.heads]

    def keys(self, x: Tensor) -> Tensor:
        """The part's share of [B, G, ...]."""
        return x[self.rows, self.key_heads]

    def add_to_keys(self, total: Tensor, share: Tensor) -> None:
        """Adjoint of `keys`."""
        if isinstance(self.key_heads, slice):
            self.keys(total).add_(share)
        else:
            total[self.rows].index_add_(1, torch.tensor(self.key_heads, device=total.device), share)


def parts(query: Tensor, key: Tensor, pattern: PiPattern, skip: bool) -> Iterator[Part]:
    """Split batch and heads so that a part has one band and its tensors stay in cache."""
    batch, heads, _, dim = query.shape
    groups, length = key.shape[1:3]
    share = heads // groups
    fit = max(1, PART_ELEMENTS // (length * dim * share))  # key heads with their query heads
    if skip and len(set(pattern.skip_bands())) > 1:
        members: dict[Band, list[int]] = {}
        for head, band in enumerate(pattern.skip_bands()):
            members.setdefault(band, []).append(head)
        for band, chosen in members.items():
            for first in range(0, len(chosen), fit):
                some = chosen[first : first + fit]
                for row in range(batch):
                    yield Part(band, slice(row, row + 1), some, [head // share for head in some])
        return
    band = pattern.skip_band() if skip else pattern.local_band
    step, rows = min(fit, groups), max(1, fit // groups)
    for row in range(0, batch, rows):
        for group in range(0, groups, step):
            end = min(group + step, groups)
            yield Part(band, slice(row, row + rows), slice(group * share, end * share), slice(group, end))


def _lay_out_part(
    part: Part,
    tensors: tuple[Tensor, Tensor, Tensor],
    starts: Tensor | None,
    pattern: PiPattern,
    skip: bool,
    scale: float,
    softcap: float | None,
) -> Rows | None:
    query = part.queries(tensors[0]).to(compute_dtype(tensors[0].dtype)) * scale
    starts = None if starts is None else starts[part.rows]
    return lay_out(query, part.keys(tensors[1]), part.keys(tensors[2]), starts, pattern, skip, part.band, softcap)


def band_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    pattern: PiPattern,
    skip: bool,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the ring-local window (sinks left out), or over the skip band.

    Args:
        query: [B, H, T, D]; key, value: [B, G, S, D]; starts: [B, S] from `segment_starts`, or None.
        softcap: of the scaled scores; None for none.

    Returns:
        out [B, H, T, D], 0 where a query sees no key; log-sum-exp [B, H, T], −inf there. fp32, or fp64 for fp64.
    """
    dtype = compute_dtype(query.dtype)
    out = torch.zeros(query.shape, dtype=dtype, device=query.device)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=dtype, device=query.device)
    for part in parts(query, key, pattern, skip):
        if query.shape[2] == 1 and pattern.causal:
            one = part.queries(query).to(dtype) * scale
            of_rows = None if starts is None else starts[part.rows]
            first_key = pattern.sinks if skip else 0
            result = band_of_one_query(one, part.keys(key), part.keys(value), of_rows, part.band, first_key, softcap)
            out[part.rows, part.heads], lse[part.rows, part.heads] = result
            continue
        rows = _lay_out_part(part, (query, key, value), starts, pattern, skip, scale, softcap)
        if rows is not None:
            out_blocks, lse_blocks = _part_forward(rows)
            out[part.rows, part.heads] = give_blocks_back(out_blocks, rows.plan, rows.groups)
            lse[part.rows, part.heads] = give_blocks_back(lse_blocks, rows.plan, rows.groups)[..., 0]
    return out, lse


def _part_forward(rows: Rows) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in residue order, [N, blocks, heads · C, D and 1]."""
    out = torch.empty_like(rows.query)
    lse = out.new_empty(*out.shape[:-1], 1)
    for chunk in rows.plan.chunks(len(rows.query), rows.heads):
        weights, chunk_lse, _, _ = rows.weights(chunk)
        sides = zip(rows.split(weights), rows.value_windows(chunk), strict=True)
        # [heads · C, W] @ [W, D] -> [heads · C, D]
        chunk_out = reduce(torch.add, [torch.bmm(p, v) for p, v in sides])
        out[chunk] = chunk_out.view(out[chunk].shape)
        lse[chunk] = chunk_lse.view(lse[chunk].shape)
    return out, lse


def band_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    starts: Tensor | None,
    pattern: PiPattern,
    skip: bool,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `band_forward` for query, key and value, in their dtypes; itself differentiable.

    dS = P·(dO·vⱼ − ⟨dO, out⟩ + dλ), with the weights P computed again from query and key; with a soft cap, times the
    derivative of the capped score.
    """
    dtype = compute_dtype(query.dtype)
    grads = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value)]
    for part in parts(query, key, pattern, skip):
        rows = _lay_out_part(part, (query, key, value), starts, pattern, skip, scale, softcap)
        if rows is None:
            continue
        plan, groups = rows.plan, rows.groups
        d_out = part.queries(grad_out)
        delta = (d_out * part.queries(out)).sum(dim=-1, keepdim=True) - part.queries(grad_lse)[..., None]
        blocks = [take_blocks(x, plan, groups) for x in (d_out, delta)]
        d_query, *d_sides = _part_backward(rows, *blocks)
        grads[0][part.rows, part.heads] = give_blocks_back(d_query, plan, groups) * scale
        shape = (-1, groups, plan.residues)
        for total, shares in zip(grads[1:], d_sides, strict=True):
            for side, share in zip(plan.sides, shares, strict=True):
                part.add_to_keys(total, give_rows_back(share.unflatten(0, shape), plan, side.first_key, pattern.ring))
    return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype)


def _part_backward(rows: Rows, grad_out: Tensor, delta: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients in residue order: of the scaled query blocks, and of each side's key and value rows."""
    plan = rows.plan
    grad_query = torch.empty_like(rows.query)
    grad_keys = [torch.zeros_like(k) for k in rows.keys]
    grad_values = [torch.zeros_like(v) for v in rows.values]
    for chunk in plan.chunks(len(rows.query), rows.heads):
        weights, _, key_windows, slope = rows.weights(chunk)
        slopes = [None] * len(key_windows) if slope is None else rows.split(slope)
        query, d_out, d = (x[chunk].flatten(0, 1) for x in (rows.query, grad_out, delta))
        sides = zip(
            *(plan.sides, rows.split(weights), slopes, key_windows, rows.value_windows(chunk), grad_keys, grad_values),
            strict=True,
        )
        d_query = []
        for side, p, slope, k, v, grad_k, grad_v in sides:
            d_score = torch.bmm(d_out, v.transpose(1, 2)).sub_(d).mul_(p)  # [heads · C, D] @ [D, W] -> [heads · C, W]
            d_score = d_score if slope is None else d_score * slope
            d_query.append(torch.bmm(d_score, k))  # [heads · C, W] @ [W, D] -> [heads · C, D]
            # [W, heads · C] @ [heads · C, D] -> [W, D]
            add_windows(grad_k, torch.bmm(d_score.transpose(1, 2), query), plan, side, chunk)
            add_windows(grad_v, torch.bmm(p.transpose(1, 2), d_out), plan, side, chunk)
        grad_query[chunk] = reduce(torch.add, d_query).view(grad_query[chunk].shape)
    return grad_query, grad_keys, grad_values
