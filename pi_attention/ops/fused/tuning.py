"""Tile sizes by kernel and head dim: a small table from measurements on an H200, instead of autotuning at run time."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

INTERPRETER_ROWS = 32


class Tiles(NamedTuple):
    """Rows BM of a program, rows BN of the other side at a time, warps and pipeline stages."""

    rows: int
    step: int
    warps: int
    stages: int


LOCAL = {
    "forward": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 4, 3), 256: Tiles(64, 32, 8, 2)},
    "backward query": {64: Tiles(64, 32, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(32, 32, 8, 1)},
    "backward key": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 4, 1), 256: Tiles(32, 32, 8, 1)},
}
"""For a row with many keys, which is bound by arithmetic; measured at D = 128 (`benchmarks/tune.py`)."""

SKIP = {
    "forward": {64: Tiles(64, 16, 4, 4), 128: Tiles(64, 16, 4, 4), 256: Tiles(32, 16, 4, 2)},
    "backward query": {64: Tiles(64, 32, 4, 1), 128: Tiles(64, 32, 4, 1), 256: Tiles(32, 16, 4, 1)},
    "backward key": {64: Tiles(64, 16, 4, 3), 128: Tiles(64, 16, 4, 3), 256: Tiles(32, 16, 4, 1)},
}
"""For a row with few keys, as of long periods, which is bound by memory; measured at D = 128 with 16 keys."""

HOPPER: dict[str, dict[int, Tiles]] = {
    "forward": {256: Tiles(128, 64, 8, 2)},
    "backward query": {256: Tiles(64, 64, 4, 2)},
    "backward key": {256: Tiles(64, 32, 8, 2)},
}
"""Instead of `LOCAL`, for elements of 2 bytes on an H100 or H200: up to 192 KiB of shared memory, which few GPUs have.

Measured with 512 keys, as in Gemma 3 (`benchmarks/tune.py --dim 256 --window 512 --heads 4 --key-heads 1`).
"""

MANY = 48
"""Keys of a row from which the skip band, too, is bound by arithmetic."""


def choose_tiles(
    kernel: str, few: bool, head_dim: int, rows: int, *, wide: bool, hopper: bool, interpreted: bool
) -> Tiles:
    """Tiles of a kernel.

    Args:
        kernel: "forward", "backward query" or "backward key".
        few: the skip band with fewer than `MANY` keys a row.
        head_dim: D.
        rows: of a sequence in residue order; a tile need not be larger.
        wide: elements of 4 bytes, which take twice the shared memory.
        hopper: an H100 or H200, with 227 KiB of shared memory for a program instead of 99.
        interpreted: small tiles, for tests on a CPU.
    """
    if interpreted:
        return Tiles(INTERPRETER_ROWS, INTERPRETER_ROWS, 4, 1)
    table = (SKIP if few else LOCAL)[kernel]
    if hopper and not few and not wide:
        table = table | HOPPER[kernel]
    return _fit(table[min(size for size in table if size >= head_dim)], rows, wide)


@lru_cache(maxsize=1024)
def _fit(tiles: Tiles, rows: int, wide: bool) -> Tiles:
    if wide:
        tiles = Tiles(max(16, tiles.rows // 2), max(16, tiles.step // 2), tiles.warps, 1)
    fit = max(16, 1 << (rows - 1).bit_length())
    return tiles._replace(rows=min(tiles.rows, fit), step=min(tiles.step, fit))
