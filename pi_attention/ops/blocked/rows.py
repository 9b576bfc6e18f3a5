"""A band laid out as rows, blocks and windows, and which of their pairs are visible.

A band of stride π is a run of neighbouring rows of the sequence in residue order: row r of residue ρ is the token
ρ + r·π. So both bands are one problem: row t sees the key rows t + first … t + last − 1. Rows are cut into blocks of
C; a block sees one window of W ≥ C + n − 1 key rows for each side of the band.

Letters: N sequences (batch · key heads · residues) · R residues · C rows of a block · n lags · W rows of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pi_attention.pattern import Band, PiPattern

PADDING_QUERY = -2  # differs from the −1 of padding and absent keys, so that a padding query sees nothing
CHUNK_SCORES = 1 << 18
"""Scores computed at a time: 1 MiB in fp32, so that the passes over a chunk stay in a CPU's cache."""


@dataclass(frozen=True)
class Side:
    """A run of lags: column c of a block's window is visible from row t of the block exactly when 0 ≤ c − t < n."""

    first_key: int  # position of key row 0 of residue 0
    lags: int  # n
    window: int  # W
    rows: int  # key rows of a sequence


@dataclass(frozen=True)
class RowPlan:
    """How one band of T queries and S keys is laid out."""

    stride: int  # π
    residues: int  # R
    queries: int  # T
    keys: int  # S
    block: int  # C
    blocks: int  # of a sequence
    sides: tuple[Side, ...]

    @property
    def rows(self) -> int:
        """Query rows of a sequence, padded to whole blocks."""
        return self.block * self.blocks

    def chunks(self, sequences: int, heads: int) -> Iterator[tuple[slice, slice]]:
        """Slices of sequences and of blocks whose scores, for `heads` query heads a key head, fit a cache."""
        scores = heads * self.block * sum(side.window for side in self.sides)
        size = max(1, CHUNK_SCORES // scores)
        if size < self.blocks:
            for sequence in range(sequences):
                for first in range(0, self.blocks, size):
                    yield slice(sequence, sequence + 1), slice(first, min(first + size, self.blocks))
        else:
            step = size // self.blocks
            for first in range(0, sequences, step):
                yield slice(first, min(first + step, sequences)), slice(0, self.blocks)


@lru_cache(maxsize=256)
def plan_rows(bands: tuple[Band, ...], query_length: int, key_length: int) -> RowPlan:
    """Lay out `bands`, disjoint runs of signed lags of one stride, for T queries at the end of S keys."""
    stride = bands[0].stride
    rows = -(-query_length // stride)
    most_lags = max(len(band) for band in bands)
    block = min(rows, max(16, min(64, 1 << (most_lags - 1).bit_length())))
    blocks = -(-rows // block)

    def side(band: Band) -> Side:
        lags = len(band)
        window = lags if block == 1 else -(-(block + lags - 1) // 8) * 8
        first_key = key_length - query_length - band.lags()[-1]
        return Side(first_key, lags, window, rows=(blocks - 1 + -(-window // block)) * block)

    return RowPlan(stride, min(stride, query_length), query_length, key_length, block, blocks, tuple(map(side, bands)))


def _clip(first: int, end: int, length: int) -> tuple[int, int, int, int]:
    """start, stop of [first, end) inside of [0, length), and how many positions lie before and after."""
    start = min(max(first, 0), length)
    stop = max(min(end, length), start)
    before = min(max(-first, 0), end - first)
    return start, stop, before, end - first - before - (stop - start)


def take_rows(x: Tensor, plan: RowPlan, first: int, rows: int, ring: bool, fill: int = 0) -> Tensor:
    """Residue order of x [B, G, S, D] from position `first`: [B, G, R, rows, D], a view where nothing is padded.

    Positions outside of x wrap when `ring`, else hold `fill`.
    """
    length = x.shape[2]
    end = first + (rows - 1) * plan.stride + plan.residues
    if ring and (first < 0 or end > length):
        x = x.index_select(2, torch.arange(first, end, device=x.device) % length)
    else:
        start, stop, before, after = _clip(first, end, length)
        x = F.pad(x[:, :, start:stop], (0, 0, before, after), value=fill)
    return x.unfold(2, plan.residues, plan.stride).permute(0, 1, 4, 2, 3)


def give_rows_back(rows: Tensor, plan: RowPlan, first: int, ring: bool) -> Tensor:
    """Adjoint of `take_rows`: [B, G, R, rows, D] -> [B, G, S, D], zero where nothing was taken."""
    batch, groups, residues, count, dim = rows.shape
    tokens = rows.new_zeros(batch, groups, count, plan.stride, dim)
    tokens[:, :, :, :residues] = rows.transpose(2, 3)
    tokens = tokens.flatten(2, 3)
    length, end = plan.keys, first + count * plan.stride
    if ring:
        position = torch.arange(first, end, device=rows.device) % length
        return rows.new_zeros(batch, groups, length, dim).index_add_(2, position, tokens)
    start, stop, before, _ = _clip(first, end, length)
    return F.pad(tokens[:, :, before : before + stop - start], (0, 0, start, length - stop))


def take_blocks(x: Tensor, plan: RowPlan, groups: int) -> Tensor:
    """Queries [B, H, T, D] in blocks that share a window: [N, blocks, heads of a group · C, D]."""
    batch, heads, _, dim = x.shape
    rows = take_rows(x, plan, 0, plan.rows, ring=False)
    rows = rows.reshape(batch, groups, heads // groups, plan.residues, plan.blocks, plan.block, dim)
    return rows.permute(0, 1, 3, 4, 2, 5, 6).reshape(batch * groups * plan.residues, plan.blocks, -1, dim)


def give_blocks_back(blocks: Tensor, plan: RowPlan, groups: int) -> Tensor:
    """Inverse of `take_blocks`: [N, blocks, heads of a group · C, D] -> [B, H, T, D]."""
    dim = blocks.shape[-1]
    x = blocks.reshape(-1, groups, plan.residues, plan.blocks, blocks.shape[2] // plan.block, plan.block, dim)
    x = x.permute(0, 1, 4, 3, 5, 2, 6)  # rows before residues: token order
    return x.reshape(x.shape[0], groups * x.shape[2], -1, dim)[:, :, : plan.queries]


def windows(rows: Tensor, plan: RowPlan, side: Side, sequences: slice, blocks: slice) -> Tensor:
    """The windows of some blocks of some sequences of `rows` [N, rows, D]: [count, W, D], a view for one sequence."""
    first, end = blocks.start * plan.block, (blocks.stop - 1) * plan.block + side.window
    view = rows[sequences, first:end].unfold(1, side.window, plan.block).transpose(-1, -2)
    return view[0] if view.shape[0] == 1 else view.flatten(0, 1)


def add_windows(rows: Tensor, window_grads: Tensor, plan: RowPlan, side: Side, chunk: tuple[slice, slice]) -> None:
    """Adjoint of `windows`: add [count, W, D] to `rows`, one block's width of every window at a time."""
    sequences, blocks = chunk
    count = blocks.stop - blocks.start
    window_grads = window_grads.unflatten(0, (-1, count))
    for offset in range(0, side.window, plan.block):
        width = min(plan.block, side.window - offset)
        first = blocks.start * plan.block + offset
        target = rows[sequences, first : first + count * plan.block].unflatten(1, (count, plan.block))
        target[:, :, :width].add_(window_grads[:, :, offset : offset + width])


class Visibility:
    """Which columns of the windows of a chunk are hidden from which rows."""

    def __init__(self, plan: RowPlan, pattern: PiPattern, skip: bool, starts: Tensor | None, device: torch.device):
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


class Weights(NamedTuple):
    """The softmax of a chunk."""

    weights: Tensor  # [count, heads · C, columns]
    lse: Tensor  # [count, heads · C]
    key_windows: list[Tensor]  # of each side
    slope: Tensor | None  # derivatives of soft-capped scores, like weights


@dataclass
class Rows:
    """One part in residue order, as forward and backward walk over it."""

    plan: RowPlan
    visibility: Visibility
    groups: int  # key heads G
    heads: int  # query heads of a key head
    query: Tensor  # [N, blocks, heads · C, D], times the scale
    keys: list[Tensor]  # of each side, [N, rows, D]
    values: list[Tensor]
    finite: bool  # known to hold no NaN in query and key
    softcap: float | None

    def weights(self, chunk: tuple[slice, slice]) -> Weights:
        """Of the scores of a chunk."""
        sequences, blocks = chunk
        query = self.query[sequences, blocks].flatten(0, 1)
        key_windows = [windows(k, self.plan, s, *chunk) for k, s in zip(self.keys, self.plan.sides, strict=True)]
        # [heads · C, D] @ [D, W] -> [heads · C, W]
        scores = [torch.bmm(query, window.transpose(1, 2)) for window in key_windows]
        score = (scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)).unflatten(1, (self.heads, -1))
        slope = None
        if self.softcap is not None:
            capped = torch.tanh(score / self.softcap)
            score, slope = capped * self.softcap, (1 - capped * capped).flatten(1, 2)
        empty = self.visibility.hide(score, chunk, self.groups * self.plan.residues, self.finite)
        weights = torch.softmax(score, dim=-1)
        # The largest weight is exp(largest score − log-sum-exp).
        lse = score.detach().amax(dim=-1) - weights.detach().amax(dim=-1).log()
        if empty is not None:
            weights = weights.masked_fill(empty, 0.0)
            lse = lse.masked_fill(empty.squeeze(-1), -torch.inf)
        return Weights(weights.flatten(1, 2), lse.flatten(1, 2), key_windows, slope)

    def split(self, columns: Tensor) -> tuple[Tensor, ...]:
        """The columns that belong to each side."""
        return columns.split([side.window for side in self.plan.sides], dim=-1)

    def value_windows(self, chunk: tuple[slice, slice]) -> list[Tensor]:
        return [windows(v, self.plan, s, *chunk) for v, s in zip(self.values, self.plan.sides, strict=True)]


def lay_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    pattern: PiPattern,
    skip: bool,
    band: Band,
    softcap: float | None,
) -> Rows | None:
    """One part in residue order, in the dtype of the scaled query; None when the sequence is too short for its band."""
    length = key.shape[2]
    bands = pattern.signed_bands(band, length)
    if not bands:
        return None
    plan = plan_rows(bands, query.shape[2], length)
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
        softcap=softcap,
    )
