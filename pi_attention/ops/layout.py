"""The plan of the blocked implementation: a band laid out as rows, blocks and windows, without arithmetic.

A band of stride π is a run of neighbouring rows of the sequence in residue order: row r of residue ρ is the token
ρ + r·π. So both bands are one problem: row t sees the key rows t + first … t + last − 1. Rows are cut into blocks of
C; a block sees one window of W ≥ C + n − 1 key rows for each side of the band.

Letters: N sequences (batch · key heads · residues) · R residues · C rows of a block · n lags · W rows of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pi_attention.pattern import Band

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
class Plan:
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
def make_plan(bands: tuple[Band, ...], query_length: int, key_length: int) -> Plan:
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

    return Plan(stride, min(stride, query_length), query_length, key_length, block, blocks, tuple(map(side, bands)))


def _clip(first: int, end: int, length: int) -> tuple[int, int, int, int]:
    """start, stop of [first, end) inside of [0, length), and how many positions lie before and after."""
    start = min(max(first, 0), length)
    stop = max(min(end, length), start)
    before = min(max(-first, 0), end - first)
    return start, stop, before, end - first - before - (stop - start)


def take_rows(x: Tensor, plan: Plan, first: int, rows: int, ring: bool, fill: int = 0) -> Tensor:
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


def give_rows_back(rows: Tensor, plan: Plan, first: int, ring: bool) -> Tensor:
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


def take_blocks(x: Tensor, plan: Plan, groups: int) -> Tensor:
    """Queries [B, H, T, D] in blocks that share a window: [N, blocks, heads of a group · C, D]."""
    batch, heads, _, dim = x.shape
    rows = take_rows(x, plan, 0, plan.rows, ring=False)
    rows = rows.reshape(batch, groups, heads // groups, plan.residues, plan.blocks, plan.block, dim)
    return rows.permute(0, 1, 3, 4, 2, 5, 6).reshape(batch * groups * plan.residues, plan.blocks, -1, dim)


def give_blocks_back(blocks: Tensor, plan: Plan, groups: int) -> Tensor:
    """Inverse of `take_blocks`: [N, blocks, heads of a group · C, D] -> [B, H, T, D]."""
    dim = blocks.shape[-1]
    x = blocks.reshape(-1, groups, plan.residues, plan.blocks, blocks.shape[2] // plan.block, plan.block, dim)
    x = x.permute(0, 1, 4, 3, 5, 2, 6)  # rows before residues: token order
    return x.reshape(x.shape[0], groups * x.shape[2], -1, dim)[:, :, : plan.queries]


def windows(rows: Tensor, plan: Plan, side: Side, sequences: slice, blocks: slice) -> Tensor:
    """The windows of some blocks of some sequences of `rows` [N, rows, D]: [count, W, D], a view for one sequence."""
    first, end = blocks.start * plan.block, (blocks.stop - 1) * plan.block + side.window
    view = rows[sequences, first:end].unfold(1, side.window, plan.block).transpose(-1, -2)
    return view[0] if view.shape[0] == 1 else view.flatten(0, 1)


def add_windows(rows: Tensor, window_grads: Tensor, plan: Plan, side: Side, chunk: tuple[slice, slice]) -> None:
    """Adjoint of `windows`: add [count, W, D] to `rows`, one block's width of every window at a time."""
    sequences, blocks = chunk
    count = blocks.stop - blocks.start
    window_grads = window_grads.unflatten(0, (-1, count))
    for offset in range(0, side.window, plan.block):
        width = min(plan.block, side.window - offset)
        first = blocks.start * plan.block + offset
        target = rows[sequences, first : first + count * plan.block].unflatten(1, (count, plan.block))
        target[:, :, :width].add_(window_grads[:, :, offset : offset + width])
