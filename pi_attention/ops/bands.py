"""One band of π-Attention in plain PyTorch, forward and backward. It runs on every device and is tuned for CPUs.

Time and memory are O(T · keys of the band). Each block of C query rows meets one window of key rows (see layout.py)
in two small matrix products; chunks of blocks stay in cache. Scores and sums are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from pi_attention.ops.layout import (
    Plan,
    Side,
    add_windows,
    give_blocks_back,
    give_rows_back,
    make_plan,
    take_blocks,
    take_rows,
    windows,
)
from pi_attention.ops.single import band_of_one_query
from pi_attention.pattern import Band, PiPattern

PART_ELEMENTS = 1 << 20
"""Elements of the keys computed together: 4 MiB in fp32, so that the memory of what is made of them is reused."""

PADDING_QUERY = -2  # differs from the −1 of padding and absent keys, so that a padding query sees nothing


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    """Split batch and heads so that a part has one period and its tensors stay in cache."""
    batch, heads, _, dim = query.shape
    groups, length = key.shape[1:3]
    share = heads // groups
    fit = max(1, PART_ELEMENTS // (length * dim * share))  # key heads with their query heads
    if skip and len(set(pattern.periods)) > 1:
        members: dict[int, list[int]] = {}
        for head in range(heads):
            members.setdefault(pattern.period_of(head), []).append(head)
        for chosen in members.values():
            for first in range(0, len(chosen), fit):
                some = chosen[first : first + fit]
                for row in range(batch):
                    yield Part(pattern.skip_band(some[0]), slice(row, row + 1), some, [head // share for head in some])
        return
    band = pattern.skip_band() if skip else pattern.local_band
    step, rows = min(fit, groups), max(1, fit // groups)
    for row in range(0, batch, rows):
        for group in range(0, groups, step):
            end = min(group + step, groups)
            yield Part(band, slice(row, row + rows), slice(group * share, end * share), slice(group, end))


class Visibility:
    """Which columns of the windows of a chunk are hidden from which rows."""

    def __init__(self, plan: Plan, pattern: PiPattern, skip: bool, starts: Tensor | None, device: torch.device):
        self.plan, self.segmented, self.ring = plan, starts is not None, pattern.ring
        self.sinks = min(pattern.sinks, plan.keys) if skip else 0  # positions are int32
        if starts is None:
            starts = torch.zeros(1, plan.keys, dtype=torch.int32, device=device)
        queries = starts[:, plan.keys - plan.queries :]
        tag = torch.where(queries < 0, PADDING_QUERY, queries)
        if self.sinks:  # sinks belong to the local band alone
            position = torch.arange(plan.keys, dtype=torch.int32, device=device)
            starts = torch.where(position - starts < self.sinks, -1, starts)
        self.query_tag = self._rows(tag, 0, plan.rows, ring=False, fill=PADDING_QUERY)
        self.key_tags = [self._rows(starts, s.first_key, s.rows, ring=pattern.ring, fill=-1) for s in plan.sides]
        row = torch.arange(plan.block, device=device)[:, None]
        lag = [torch.arange(side.window, device=device) - row for side in plan.sides]
        outside = [(c < 0) | (c >= side.lags) for c, side in zip(lag, plan.sides, strict=True)]
        self.outside = torch.cat(outside, dim=-1)  # [C, columns], a column being a window row of some side
        self.bound = torch.where(self.outside, -torch.inf, torch.inf)

    def _rows(self, tags: Tensor, first: int, rows: int, ring: bool, fill: int) -> Tensor:
        """[B, S] in residue order, [B · R, rows, 1]."""
        return take_rows(tags[:, None, :, None], self.plan, first, rows, ring, fill).flatten(0, 2)

    def _interior(self, side: Side, blocks: slice) -> bool:
        """True when each window of these blocks lies inside of the sequence and holds no sink."""
        plan = self.plan
        first = side.first_key + blocks.start * plan.block * plan.stride
        rows = (blocks.stop - 1) * plan.block + side.window
        end = side.first_key + (rows - 1) * plan.stride + plan.residues
        return first >= self.sinks and end <= plan.keys

    def hide(self, scores: Tensor, chunk: tuple[slice, slice], sequences_per_batch: int, finite: bool) -> Tensor | None:
        """Set hidden scores [count, heads, C, columns] to −inf in place; the rows that see nothing, [count, 1, C, 1].

        Those rows keep their scores, so that their softmax is finite. None: there are none. `finite`: no score is NaN.
        """
        if not self.segmented and all(self._interior(side, chunk[1]) for side in self.plan.sides):
            if finite:
                scores.clamp_max_(self.bound)  # on a CPU a tenth of the time of masked_fill_
            else:
                scores.masked_fill_(self.outside, -torch.inf)
            return None
        hidden = self._hidden(chunk, sequences_per_batch)
        empty = hidden.all(dim=-1, keepdim=True)
        scores.masked_fill_(hidden & ~empty, -torch.inf)
        return empty

    def _hidden(self, chunk: tuple[slice, slice], sequences_per_batch: int) -> Tensor:
        """Hidden pairs [count, 1, C, columns]: outside of the band, of the sequence or of the segment."""
        plan, (sequences, blocks) = self.plan, chunk
        device = self.outside.device
        sequence = torch.arange(sequences.start, sequences.stop, device=device)
        tag_row = sequence % plan.residues
        if self.segmented:
            tag_row = tag_row + sequence // sequences_per_batch * plan.residues
        everything = slice(0, len(tag_row))
        query = self.query_tag[tag_row].unflatten(1, (-1, plan.block))[:, blocks].flatten(0, 1)  # [count, C, 1]
        keys = [
            windows(tags[tag_row], plan, side, everything, blocks).transpose(-1, -2)  # [count, 1, W]
            for side, tags in zip(plan.sides, self.key_tags, strict=True)
        ]
        return (self.outside | (torch.cat(keys, dim=-1) != query))[:, None]


@dataclass
class Rows:
    """One part in residue order, as forward and backward walk over it."""

    plan: Plan
    visibility: Visibility
    groups: int  # key heads G
    heads: int  # query heads of a key head
    query: Tensor  # [N, blocks, heads · C, D], times the scale
    keys: list[Tensor]  # of each side, [N, rows, D]
    values: list[Tensor]
    finite: bool  # known to hold no NaN in query and key

    def weights(self, chunk: tuple[slice, slice]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Softmax weights of a chunk [count, heads · C, columns], its log-sum-exp, and the key windows of each side."""
        sequences, blocks = chunk
        query = self.query[sequences, blocks].flatten(0, 1)
        key_windows = [windows(k, self.plan, s, *chunk) for k, s in zip(self.keys, self.plan.sides, strict=True)]
        # [heads · C, D] @ [D, W] -> [heads · C, W]
        scores = [torch.bmm(query, window.transpose(1, 2)) for window in key_windows]
        score = (scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)).unflatten(1, (self.heads, -1))
        empty = self.visibility.hide(score, chunk, self.groups * self.plan.residues, self.finite)
        weights = torch.softmax(score, dim=-1)
        # The largest weight is exp(largest score − log-sum-exp).
        lse = score.detach().amax(dim=-1) - weights.detach().amax(dim=-1).log()
        if empty is not None:
            weights = weights.masked_fill(empty, 0.0)
            lse = lse.masked_fill(empty.squeeze(-1), -torch.inf)
        return weights.flatten(1, 2), lse.flatten(1, 2), key_windows

    def split(self, columns: Tensor) -> tuple[Tensor, ...]:
        """The columns that belong to each side."""
        return columns.split([side.window for side in self.plan.sides], dim=-1)

    def value_windows(self, chunk: tuple[slice, slice]) -> list[Tensor]:
        return [windows(v, self.plan, s, *chunk) for v, s in zip(self.values, self.plan.sides, strict=True)]


def lay_out(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, pattern: PiPattern, skip: bool, band: Band
) -> Rows | None:
    """One part in residue order, in the dtype of the scaled query; None when the sequence is too short for its band."""
    length = key.shape[2]
    bands = pattern.signed_bands(band, length)
    if not bands:
        return None
    plan = make_plan(bands, query.shape[2], length)
    groups = key.shape[1]

    def sides(x: Tensor) -> list[Tensor]:
        taken = [take_rows(x, plan, side.first_key, side.rows, pattern.ring) for side in plan.sides]
        return [rows.to(query.dtype).flatten(0, 2).contiguous() for rows in taken]

    finite = query.device.type == "cpu" and bool((query.sum() + key.sum()).isfinite())
    return Rows(
        plan=plan,
        visibility=Visibility(plan, pattern, skip, starts, query.device),
        groups=groups,
        heads=query.shape[1] // groups,
        query=take_blocks(query, plan, groups),
        keys=sides(key),
        values=sides(value),
        finite=finite,
    )


def _lay_out_part(
    part: Part,
    tensors: tuple[Tensor, Tensor, Tensor],
    starts: Tensor | None,
    pattern: PiPattern,
    skip: bool,
    scale: float,
) -> Rows | None:
    query = part.queries(tensors[0]).to(compute_dtype(tensors[0].dtype)) * scale
    starts = None if starts is None else starts[part.rows]
    return lay_out(query, part.keys(tensors[1]), part.keys(tensors[2]), starts, pattern, skip, part.band)


def band_forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, pattern: PiPattern, skip: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the ring-local window (sinks left out), or over the skip band.

    Args:
        query: [B, H, T, D]; key, value: [B, G, S, D]; starts: [B, S] from `segment_starts`, or None.

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
            result = band_of_one_query(one, part.keys(key), part.keys(value), of_rows, part.band, first_key)
            out[part.rows, part.heads], lse[part.rows, part.heads] = result
            continue
        rows = _lay_out_part(part, (query, key, value), starts, pattern, skip, scale)
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
        weights, chunk_lse, _ = rows.weights(chunk)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `band_forward` for query, key and value, in their dtypes; itself differentiable.

    dS = P·(dO·vⱼ − ⟨dO, out⟩ + dλ), with the weights P computed again from query and key.
    """
    dtype = compute_dtype(query.dtype)
    grads = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value)]
    for part in parts(query, key, pattern, skip):
        rows = _lay_out_part(part, (query, key, value), starts, pattern, skip, scale)
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
        weights, _, key_windows = rows.weights(chunk)
        query, d_out, d = (x[chunk].flatten(0, 1) for x in (rows.query, grad_out, delta))
        sides = zip(
            plan.sides, rows.split(weights), key_windows, rows.value_windows(chunk), grad_keys, grad_values, strict=True
        )
        d_query = []
        for side, p, k, v, grad_k, grad_v in sides:
            d_score = torch.bmm(d_out, v.transpose(1, 2)).sub_(d).mul_(p)  # [heads · C, D] @ [D, W] -> [heads · C, W]
            d_query.append(torch.bmm(d_score, k))  # [heads · C, W] @ [W, D] -> [heads · C, D]
            # [W, heads · C] @ [heads · C, D] -> [W, D]
            add_windows(grad_k, torch.bmm(d_score.transpose(1, 2), query), plan, side, chunk)
            add_windows(grad_v, torch.bmm(p.transpose(1, 2), d_out), plan, side, chunk)
        grad_query[chunk] = reduce(torch.add, d_query).view(grad_query[chunk].shape)
    return grad_query, grad_keys, grad_values
