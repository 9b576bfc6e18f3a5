"""Describe the kernels' work: allocate, lay out bands, choose tiles. No arithmetic on the host, no synchronisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from pi_attention.ops.triton.backward import band_backward_key_kernel, band_backward_query_kernel, row_terms_kernel
from pi_attention.ops.triton.decode import decode_kernel, join_kernel
from pi_attention.ops.triton.forward import band_forward_kernel
from pi_attention.ops.triton.launcher import Constants, Launcher
from pi_attention.ops.triton.tuning import Tiles, choose_tiles
from pi_attention.pattern import PiPattern

LOG2E = 1.4426950408889634
INTERPRETED = triton.knobs.runtime.interpret

forward = Launcher(band_forward_kernel)
backward_query = Launcher(band_backward_query_kernel)
backward_key = Launcher(band_backward_key_kernel)
row_terms = Launcher(row_terms_kernel)
decode = Launcher(decode_kernel)
join = Launcher(join_kernel)


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
        BD=max(16, triton.next_power_of_2(shape.dim)),
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
    return Plan(programs, (count, shape.heads, shape.queries, shape.keys, *lags, pattern.sinks), tiles, constants)


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
        plan = make_plan(kernel, self.pattern, self.skip, self.shape, tuple({**flags, "DESCRIBED": described}.items()))
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
    return "ieee" if x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32"


def launch_forward(
    launch: Launch, fuse: tuple[Tensor, Tensor] | None = None, gate: Tensor | None = None, mass: bool = False
) -> tuple[Tensor, Tensor]:
    """out [B, H, T, D] and log-sum-exp [B, H, T] of a band; with `fuse`, out is fused with that skip output and lse."""
    query = launch.query
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    plan, keys = launch.keys("forward", FUSE=fuse is not None, MASS=mass, GATED=gate is not None)
    gates = lse if gate is None else gate
    forward(
        plan.programs * query.shape[0],
        (query, *keys, *launch.others(), gates, *(fuse or (out, lse)), out, lse),
        launch.strides(),
        (*gates.stride(), *plan.sizes, launch.scale * LOG2E),
        plan.constants,
    )
    return out, lse


@dataclass(frozen=True)
class Saved:
    """What a forward pass leaves for the backward pass; of the skip band only when both were computed."""

    out: Tensor
    lse: Tensor
    skip_out: Tensor | None
    skip_lse: Tensor | None


@lru_cache(maxsize=256)
def _row_constants(dim: int, both: bool, mass: bool, gated: bool) -> Constants:
    width, rows = max(16, triton.next_power_of_2(dim)), 256 if INTERPRETED else 64
    return Constants({"num_warps": 4}, D=dim, BD=width, BM=rows, BOTH=both, MASS=mass, GATED=gated)


def launch_row_terms(
    saved: Saved, grad_out: Tensor, grad_lse: Tensor, grad_skip_lse: Tensor, gate: Tensor | None, mass: bool
) -> tuple[Tensor, Tensor | None]:
    """Terms w, c of the one band, or of the local and the skip band, [2 or 4, B, H, T]; gradient of the gate logits."""
    batch, heads, length, dim = saved.out.shape
    skip_out, skip_lse = saved.skip_out, saved.skip_lse
    if skip_out is None or skip_lse is None:
        skip_out, skip_lse, grad_skip_lse = saved.out, saved.lse, grad_lse
    both = saved.skip_out is not None
    terms = torch.empty(4 if both else 2, batch, heads, length, dtype=torch.float32, device=saved.out.device)
    grad_gate = torch.empty_like(saved.lse) if gate is not None else None
    gates = saved.lse if gate is None else gate
    constants = _row_constants(dim, both, mass, gate is not None)
    row_terms(
        cdiv(batch * heads * length, constants.values["BM"]),
        (
            *(grad_out, saved.out, skip_out, saved.lse, skip_lse, grad_lse.contiguous(), grad_skip_lse.contiguous()),
            *(gates, terms, terms if grad_gate is None else grad_gate),
        ),
        grad_out.stride(),
        (*gates.stride(), heads, length, batch * heads * length),
        constants,
    )
    return terms, grad_gate


def launch_backward_query(
    launch: Launch, grad_out: Tensor, lse: Tensor, terms: Tensor, grad_query: Tensor, add: bool
) -> None:
    """Write the gradient of the queries of one band, or add it to what is there."""
    plan, keys = launch.keys("backward query", ADD=add)
    backward_query(
        plan.programs * launch.query.shape[0],
        (launch.query, *keys, *launch.others(), grad_out, lse, terms[0], terms[1], grad_query),
        launch.strides() + grad_out.stride(),
        (*plan.sizes, launch.scale, launch.scale * LOG2E),
        plan.constants,
    )


def launch_backward_key(
    launch: Launch, grad_out: Tensor, lse: Tensor, terms: Tensor, grads: tuple[Tensor, Tensor], add: bool
) -> None:
    """Write the gradients of the keys and values of one band, or add them to what is there."""
    for first, members in _members(launch):
        plan = launch.plan("backward key", ADD=add or first > 0)
        backward_key(
            plan.programs * launch.query.shape[0],
            (launch.query, launch.key, launch.value, *launch.others(), grad_out, lse, terms[0], terms[1], *grads),
            launch.strides() + grad_out.stride(),
            (*plan.sizes, first, members, launch.scale, launch.scale * LOG2E),
            plan.constants,
        )


def _members(launch: Launch) -> Iterator[tuple[int, int]]:
    """Heads of a group that one launch serves: all, or one after another where their periods differ."""
    if launch.skip and has_periods(launch.pattern):
        for member in range(launch.group):
            yield member, 1
    else:
        yield 0, launch.group


@lru_cache(maxsize=256)
def _decode_constants(group: int, dim: int, queries: int, segments: bool, per_head: bool, precision: str) -> Constants:
    rows = (1 if per_head else group) * queries
    return Constants(
        {"num_warps": 4, "num_stages": 2},
        GROUP=group,
        D=dim,
        BD=max(16, triton.next_power_of_2(dim)),
        BM=max(16, triton.next_power_of_2(rows)),
        BN=32,
        SEGMENTS=segments,
        PER_HEAD=per_head,
        PRECISION=precision,
    )


@lru_cache(maxsize=256)
def _join_constants(dim: int, splits: int, mass: bool, gated: bool) -> Constants:
    width, parts = max(16, triton.next_power_of_2(dim)), triton.next_power_of_2(splits)
    return Constants({"num_warps": 4}, D=dim, BD=width, BS=parts, MASS=mass, GATED=gated)


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def launch_decode(launch: Launch, gate: Tensor | None, mass: bool) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, T, D] of both bands with sinks, log-sum-exps [B, H, T] of the local and of the skip band.

    Two programs a multiprocessor, each with at least 32 keys of the window; a second kernel joins their parts.
    """
    query, pattern = launch.query, launch.pattern
    batch, heads, length, dim = query.shape
    keys = launch.key.shape[2]
    per_head = has_periods(pattern)
    programs = batch * (heads if per_head else heads // launch.group)
    splits = min(cdiv(2 * _multiprocessors(query.device), programs), cdiv(pattern.window + length - 1, 32), 64)
    parts = torch.empty(2, splits, batch, heads, length, dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(2, splits, batch, heads, length, dtype=torch.float32, device=query.device)
    segments = launch.starts is not None
    decode(
        programs * splits,
        (query, launch.key, launch.value, *launch.others(), parts, part_lse),
        launch.strides(),
        (
            *(splits, heads, length, keys, *row_lags(pattern, True, 0, keys), pattern.sinks),
            *(pattern.window, launch.scale * LOG2E),
        ),
        _decode_constants(launch.group, dim, length, segments, per_head, precision(query)),
    )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse, lse_skip = (torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) for _ in range(2))
    gates = lse if gate is None else gate
    join(
        batch * heads * length,
        (parts, part_lse, gates, out, lse, lse_skip),
        (),
        (*gates.stride(), batch * heads * length, heads, length, splits),
        _join_constants(dim, splits, mass, gate is not None),
    )
    return out, lse, lse_skip
