"""One band of π-Attention in plain PyTorch, forward and backward. It runs on every device and is tuned for CPUs.

Time and memory are O(T · keys of the band). Each block of C query rows meets one window of key rows (see layout.py)
in two small matrix products; chunks of blocks stay in cache. Scores and sums are fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

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
from pi_attention.pattern import Band, PiPattern

PADDING_QUERY = -2  # differs from the −1 of padding and absent keys, so that a padding query sees nothing


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class HeadGroup:
    """Query heads of one period, with the key heads that they attend to."""

    band: Band
    heads: list[int]
    key_heads: list[int]
    whole: bool  # all heads: no selection needed


def head_groups(pattern: PiPattern, skip: bool, heads: int, key_heads: int) -> list[HeadGroup]:
    """The heads by period: one group that shares windows of keys when there is one period."""
    if not skip or len(set(pattern.periods)) == 1:
        band = pattern.skip_band() if skip else pattern.local_band
        return [HeadGroup(band, list(range(heads)), list(range(key_heads)), whole=True)]
    members: dict[int, list[int]] = {}
    for head in range(heads):
        members.setdefault(pattern.period_of(head), []).append(head)
    share = heads // key_heads
    return [
        HeadGroup(pattern.skip_band(group[0]), group, [head // share for head in group], whole=False)
        for group in members.values()
    ]


class Visibility:
    """Which columns of the windows of a chunk are hidden from which rows."""

    def __init__(self, plan: Plan, pattern: PiPattern, skip: bool, starts: Tensor | None, device: torch.device):
        self.plan, self.segmented, self.ring = plan, starts is not None, pattern.ring
        self.sinks = pattern.sinks if skip else 0
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
        self.outside = torch.cat(outside, dim=-1)  # [C, sum of W]

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

    def hidden(self, chunk: tuple[slice, slice], sequences_per_batch: int) -> tuple[Tensor, Tensor | None]:
        """Hidden pairs, [C, columns] or [count, 1, C, columns], and rows that see nothing, None or [count, 1, C, 1]."""
        plan, (sequences, blocks) = self.plan, chunk
        if not self.segmented and all(self._interior(side, blocks) for side in plan.sides):
            return self.outside, None
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
        hidden = (self.outside | (torch.cat(keys, dim=-1) != query))[:, None]
        empty = hidden.all(dim=-1, keepdim=True)
        return hidden & ~empty, empty


@dataclass
class Rows:
    """One head group in residue order, as forward and backward walk over it."""

    plan: Plan
    visibility: Visibility
    groups: int  # key heads G
    heads: int  # query heads of a key head
    query: Tensor  # [N, blocks, heads · C, D], times the scale
    keys: list[Tensor]  # of each side, [N, rows, D]
    values: list[Tensor]

    def weights(self, chunk: tuple[slice, slice]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Softmax weights of a chunk [count, heads · C, columns], its log-sum-exp, and the key windows of each side."""
        sequences, blocks = chunk
        query = self.query[sequences, blocks].flatten(0, 1)
        key_windows = [windows(k, self.plan, s, *chunk) for k, s in zip(self.keys, self.plan.sides, strict=True)]
        # [heads · C, D] @ [D, W] -> [heads · C, W]
        scores = [torch.bmm(query, window.transpose(1, 2)) for window in key_windows]
        score = (scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)).unflatten(1, (self.heads, -1))
        hidden, empty = self.visibility.hidden(chunk, self.groups * self.plan.residues)
        score.masked_fill_(hidden, -torch.inf)
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
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, pattern: PiPattern, skip: bool, group: HeadGroup
) -> Rows | None:
    """A head group in residue order, in the dtype of the scaled query; None when the sequence is too short for it."""
    length = key.shape[2]
    bands = pattern.signed_bands(group.band, length)
    if not bands:
        return None
    if not group.whole:
        query, key, value = query[:, group.heads], key[:, group.key_heads], value[:, group.key_heads]
    plan = make_plan(bands, query.shape[2], length)
    groups = key.shape[1]

    def sides(x: Tensor) -> list[Tensor]:
        taken = [take_rows(x, plan, side.first_key, side.rows, pattern.ring) for side in plan.sides]
        return [rows.to(query.dtype).flatten(0, 2).contiguous() for rows in taken]

    return Rows(
        plan=plan,
        visibility=Visibility(plan, pattern, skip, starts, query.device),
        groups=groups,
        heads=query.shape[1] // groups,
        query=take_blocks(query, plan, groups),
        keys=sides(key),
        values=sides(value),
    )


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
    out = torch.zeros_like(query, dtype=dtype, memory_format=torch.contiguous_format)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=dtype, device=query.device)
    for group in head_groups(pattern, skip, query.shape[1], key.shape[1]):
        rows = lay_out(query.to(dtype) * scale, key, value, starts, pattern, skip, group)
        if rows is None:
            continue
        out_blocks = torch.empty_like(rows.query)
        lse_blocks = out_blocks.new_empty(*out_blocks.shape[:-1], 1)
        for chunk in rows.plan.chunks(len(rows.query), rows.heads):
            weights, chunk_lse, _ = rows.weights(chunk)
            parts = zip(rows.split(weights), rows.value_windows(chunk), strict=True)
            # [heads · C, W] @ [W, D] -> [heads · C, D]
            chunk_out = reduce(torch.add, [torch.bmm(p, v) for p, v in parts])
            out_blocks[chunk] = chunk_out.view(out_blocks[chunk].shape)
            lse_blocks[chunk] = chunk_lse.view(lse_blocks[chunk].shape)
        group_out = give_blocks_back(out_blocks, rows.plan, rows.groups)
        group_lse = give_blocks_back(lse_blocks, rows.plan, rows.groups)[..., 0]
        if group.whole:
            return group_out.contiguous(), group_lse.contiguous()
        out[:, group.heads], lse[:, group.heads] = group_out, group_lse
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
    grads = [torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (query, key, value)]
    grad_query, grad_key, grad_value = grads
    delta = (grad_out * out).sum(dim=-1, keepdim=True) - grad_lse[..., None]
    for group in head_groups(pattern, skip, query.shape[1], key.shape[1]):
        rows = lay_out(query.to(dtype) * scale, key, value, starts, pattern, skip, group)
        if rows is None:
            continue
        of_group = [x if group.whole else x[:, group.heads] for x in (grad_out, delta)]
        dq, dks, dvs = _group_backward(rows, *(take_blocks(x, rows.plan, rows.groups) for x in of_group))
        dq = give_blocks_back(dq, rows.plan, rows.groups) * scale
        shape = (query.shape[0], rows.groups, rows.plan.residues)
        for side, dk, dv in zip(rows.plan.sides, dks, dvs, strict=True):
            for total, part in ((grad_key, dk), (grad_value, dv)):
                part = give_rows_back(part.unflatten(0, shape), rows.plan, side.first_key, pattern.ring)
                if group.whole:
                    total += part
                else:
                    total.index_add_(1, torch.tensor(group.key_heads, device=total.device), part)
        if group.whole:
            grad_query = dq
        else:
            grad_query[:, group.heads] = dq
    return grad_query.to(query.dtype).contiguous(), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _group_backward(rows: Rows, grad_out: Tensor, delta: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients in residue order: of the scaled query blocks, and of each side's key and value rows."""
    plan = rows.plan
    grad_query = torch.empty_like(rows.query)
    grad_keys = [torch.zeros_like(k) for k in rows.keys]
    grad_values = [torch.zeros_like(v) for v in rows.values]
    for chunk in plan.chunks(len(rows.query), rows.heads):
        weights, _, key_windows = rows.weights(chunk)
        query, d_out, d = (x[chunk].flatten(0, 1) for x in (rows.query, grad_out, delta))
        parts = zip(
            plan.sides, rows.split(weights), key_windows, rows.value_windows(chunk), grad_keys, grad_values, strict=True
        )
        d_query = []
        for side, p, k, v, grad_k, grad_v in parts:
            d_score = torch.bmm(d_out, v.transpose(1, 2)).sub_(d).mul_(p)  # [heads · C, D] @ [D, W] -> [heads · C, W]
            d_query.append(torch.bmm(d_score, k))  # [heads · C, W] @ [W, D] -> [heads · C, D]
            # [W, heads · C] @ [heads · C, D] -> [W, D]
            add_windows(grad_k, torch.bmm(d_score.transpose(1, 2), query), plan, side, chunk)
            add_windows(grad_v, torch.bmm(p.transpose(1, 2), d_out), plan, side, chunk)
        grad_query[chunk] = reduce(torch.add, d_query).view(grad_query[chunk].shape)
    return grad_query, grad_keys, grad_values
