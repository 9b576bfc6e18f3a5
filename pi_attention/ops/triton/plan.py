"""How a kernel serves one band of one call: tiles, sizes, constants, descriptors. No tensor is read here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from pi_attention.ops.triton.launcher import Constants
from pi_attention.ops.triton.tuning import Tiles, choose_tiles
from pi_attention.pattern import PiPattern

INTERPRETED = triton.knobs.runtime.interpret


@lru_cache(maxsize=4096)
def row_lags(pattern: PiPattern, skip: bool, head: int, length: int) -> tuple[int, int, int, int, int]:
    """Period, and the row lags [first, last) of the band and of its mirror image, of one head."""
    band = pattern.skip_band(head) if skip else pattern.local_band
    sides = [(side.first, side.last or 0) for side in pattern.signed_bands(band, length)]
    sides = [(0, 0)] * (2 - len(sides)) + sides
    return band.stride, *sides[1], *sides[0]


@lru_cache(maxsize=64)
def band_table(pattern: PiPattern, length: int, device: torch.device) -> Tensor:
    """`row_lags` of the skip band of every head, [H, 5]."""
    rows = [row_lags(pattern, True, head, length) for head in range(len(pattern.periods))]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def has_periods(pattern: PiPattern) -> bool:
    """Whether heads differ in their period."""
    return len(set(pattern.periods)) > 1


def padded(size: int) -> int:
    """The size of a tile's dimension: a power of two of at least 16, as products want it."""
    return max(16, triton.next_power_of_2(size))


class Shape(NamedTuple):
    """What a launch depends on beside the pattern and the tensors' addresses."""

    heads: int
    groups: int
    queries: int
    keys: int
    dim: int
    dtype: torch.dtype
    segments: bool
    precision: str


class Plan(NamedTuple):
    """How a kernel serves one band of one shape."""

    programs: int
    """For each row of the batch."""
    sizes: tuple[int, ...]
    """tiles, H, T, S, period, first, last, mirror_first, mirror_last, sinks."""
    tiles: Tiles
    constants: Constants


@lru_cache(maxsize=4096)
def make_plan(kernel: str, pattern: PiPattern, skip: bool, shape: Shape, flags: tuple[tuple[str, bool], ...]) -> Plan:
    """The plan of "forward", "backward query" or "backward key"."""
    periods = pattern.periods if skip else (1,)
    length = shape.keys if kernel == "backward key" else shape.queries
    rows, wide = cdiv(length, min(periods)), shape.dtype.itemsize > 2
    tiles = choose_tiles(kernel, skip, shape.dim, rows, wide=wide, interpreted=INTERPRETED)
    # Queries leave out the residues that have none.
    residues = [min(period, length) if kernel != "backward key" else period for period in periods]
    count = max(r * cdiv(cdiv(length, period), tiles.rows) for r, period in zip(residues, periods, strict=True))
    lags = row_lags(pattern, skip, 0, shape.keys)
    constants = Constants(
        {"num_warps": tiles.warps, "num_stages": tiles.stages},
        GROUP=shape.heads // shape.groups,
        D=shape.dim,
        BD=padded(shape.dim),
        BM=tiles.rows,
        BN=tiles.step,
        RING=pattern.ring,
        SEGMENTS=shape.segments,
        SINKS=skip and pattern.sinks > 0,
        PER_HEAD=skip and has_periods(pattern),
        MIRROR=skip and not pattern.causal,
        **dict(flags),
        PRECISION=shape.precision,
    )
    programs = count * (shape.groups if kernel == "backward key" else shape.heads)
    return Plan(
        programs,
        (count, shape.heads, shape.queries, shape.keys, *lags, min(pattern.sinks, shape.keys)),
        tiles,
        constants,
    )


@lru_cache(maxsize=16)
def _has_descriptors(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def describable(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator (Hopper and later) can load tiles of these tensors [B, H, T, D]."""
    return all(
        x.dtype.itemsize == 2
        and x.stride(3) == 1
        and not x.data_ptr() & 15
        and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:3])
        for x in tensors
    ) and _has_descriptors(tensors[0].device)


@dataclass(frozen=True, eq=False)
class Launch:
    """One band of one call: what all of its kernels are given."""

    query: Tensor
    key: Tensor
    value: Tensor
    starts: Tensor | None
    pattern: PiPattern
    skip: bool
    scale: float

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    @property
    def shape(self) -> Shape:
        (_, heads, queries, dim), (_, groups, keys, _) = self.query.shape, self.key.shape
        segments, dtype = self.starts is not None, self.query.dtype
        return Shape(heads, groups, queries, keys, dim, dtype, segments, precision(self.query))

    def plan(self, kernel: str, **flags: bool) -> Plan:
        return make_plan(kernel, self.pattern, self.skip, self.shape, tuple(flags.items()))

    def keys(self, kernel: str, **flags: bool) -> tuple[Plan, tuple[Any, Any]]:
        """The plan of a kernel that walks over keys, and what it loads keys and values from: descriptors if they pay.

        They serve the local band, whose rows are neighbours. Below 2²¹ elements the kernels are short, and the host's
        20 µs a descriptor cost more than they save.
        """
        large = self.query.numel() >= 1 << 21 or INTERPRETED
        described = large and not self.skip and not self.pattern.ring and describable(self.key, self.value)
        plan = self.plan(kernel, **flags, DESCRIBED=described)
        if not described:
            return plan, (self.key, self.value)
        block = [1, 1, plan.tiles.step, plan.constants.values["BD"]]
        return plan, tuple(TensorDescriptor(x, list(x.shape), list(x.stride()), block) for x in (self.key, self.value))

    def others(self) -> tuple[Tensor, Tensor]:
        """Starts and Bands; what is not there is any pointer, and not read."""
        bands = self.query
        if self.skip and has_periods(self.pattern):
            bands = band_table(self.pattern, self.key.shape[2], self.query.device)
        return self.query if self.starts is None else self.starts, bands

    def strides(self) -> tuple[int, ...]:
        return self.query.stride() + self.key.stride() + self.value.stride()


def precision(x: Tensor) -> str:
    """How products of x are computed: fp32 exactly, unless torch allows tf32."""
    # Once fp32_precision is set, reading allow_tf32 raises.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    tf32 = setting == "tf32" if setting is not None else torch.backends.cuda.matmul.allow_tf32
    return "ieee" if x.dtype == torch.float32 and not tf32 else "tf32"
