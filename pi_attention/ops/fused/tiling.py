"""How the kernels serve a call: tiles, sizes, compile-time constants, tables. No tensor of the call is read here."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import cdiv

from pi_attention.ops.fused.compiled import Constants
from pi_attention.ops.fused.kernels.steps import BY_START, BY_TAG
from pi_attention.ops.fused.layout import by_token
from pi_attention.ops.fused.tuning import MANY, Tiles, choose_tiles
from pi_attention.pattern import PiPattern

INTERPRETED = triton.knobs.runtime.interpret


class Problem(NamedTuple):
    """What a call looks like: everything that its launches depend on beside the tensors' addresses."""

    pattern: PiPattern
    mass: bool
    scale: float
    query: tuple[int, ...]
    """[B, H, T, D]."""
    key: tuple[int, ...]
    """[B, G, S, D]."""
    strides: tuple[int, ...]
    """Of query, key and value."""
    gate: tuple[tuple[int, ...], torch.dtype] | None
    """Strides and dtype of the gate logits."""
    segments: bool
    dtype: torch.dtype
    device: torch.device
    precision: str
    aligned: bool
    """Whether query, key and value start at multiples of 16 bytes."""
    sink_logit: bool = False
    """Whether a sink logit has its share."""
    softcap: float = 0.0
    """Of the scores; 0 for none. A constant of the kernels."""
    paged: bool = False
    """Whether a table says where the keys of each batch row lie; S is then the most that a row has."""

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.query[1] // self.key[1]

    @property
    def both(self) -> bool:
        """Whether there is a skip band beside the local one."""
        return self.pattern.skips != 0

    @property
    def gate_strides(self) -> tuple[int, ...]:
        """Those of the gate, or zeros."""
        return (0, 0, 0) if self.gate is None else self.gate[0]

    @property
    def out_by_token(self) -> bool:
        """Whether the rows of the output lie token by token, as those of the query do."""
        return by_token(self.strides[:4])

    @property
    def grads_by_token(self) -> tuple[bool, ...]:
        """The same of the gradients of query, key and value; with skips they lie head by head."""
        return tuple(not self.both and by_token(self.strides[i : i + 4]) for i in (0, 4, 8))

    @property
    def sinks(self) -> int:
        """Sinks that a sequence can have."""
        return min(self.pattern.sinks, self.key[2])


def problem_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    starts: Tensor | None,
    pattern: PiPattern,
    mass: bool,
    scale: float,
    sink_logit: Tensor | None = None,
    softcap: float | None = None,
) -> Problem:
    """The description of a call."""
    return Problem(
        pattern,
        mass,
        scale,
        query.shape,
        key.shape,
        query.stride() + key.stride() + value.stride(),
        None if gate is None else (gate.stride(), gate.dtype),
        starts is not None,
        query.dtype,
        query.device,
        precision(query),
        not (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15,
        sink_logit is not None,
        softcap or 0.0,
    )


def precision(x: Tensor) -> str:
    """How products of x are computed: fp32 exactly, unless torch allows tf32."""
    if x.dtype != torch.float32:
        return "tf32"
    # Once fp32_precision is set, reading allow_tf32 raises.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    tf32 = setting == "tf32" if setting is not None else torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def padded(size: int) -> int:
    """The size of a tile's dimension: a power of two of at least 16, as products want it."""
    return max(16, triton.next_power_of_2(size))


@lru_cache(maxsize=4096)
def row_lags(pattern: PiPattern, skip: bool, head: int, length: int) -> tuple[int, int, int, int, int, int]:
    """Period, phase, and the row lags [first, last) of the band and of its mirror image, of one head."""
    band = pattern.skip_band(head) if skip else pattern.local_band
    sides = [(side.first, side.last or 0) for side in pattern.signed_bands(band, length)]
    sides = [(0, 0)] * (2 - len(sides)) + sides
    return band.stride, band.phase, *sides[1], *sides[0]


@lru_cache(maxsize=256)
def heads_differ(pattern: PiPattern) -> bool:
    """Whether heads differ in their skip keys."""
    return pattern.skips != 0 and len(set(pattern.skip_bands())) > 1


def skip_lags(pattern: PiPattern, length: int) -> list[tuple[int, int, int, int, int, int]]:
    """`row_lags` of the skip band of every head where they differ, else of one."""
    heads = range(len(pattern.periods) if heads_differ(pattern) else 1)
    return [row_lags(pattern, True, head, length) for head in heads]


def most_lags(bands: list[tuple[int, int, int, int, int, int]]) -> int:
    """The most row lags [first, last) of one of these heads."""
    return max(last - first for _, _, first, last, *_ in bands)


@lru_cache(maxsize=64)
def band_table(pattern: PiPattern, length: int, device: torch.device) -> Tensor:
    """`skip_lags` of heads that differ, [H, 6]."""
    return torch.tensor(skip_lags(pattern, length), dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def classes(pattern: PiPattern, group: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The query heads of every key head, by their period: as many classes for each, the last of them perhaps empty."""
    heads = range(len(pattern.periods))
    found = []
    for first in heads[::group]:
        of_period: dict[int, list[int]] = {}
        for head in heads[first : first + group]:
            of_period.setdefault(pattern.period_of(head), []).append(head)
        found.append([tuple(members) for members in of_period.values()])
    most = max(map(len, found))
    return tuple((*of_group, *[()] * (most - len(of_group))) for of_group in found)


@lru_cache(maxsize=64)
def member_table(pattern: PiPattern, group: int, device: torch.device) -> Tensor:
    """`classes` as [G, classes, 1 + group]: how many heads, and which; an empty class names one, for its period."""
    rows = [
        [[len(members), *members, *[number * group] * (group - len(members))] for members in of_group]
        for number, of_group in enumerate(classes(pattern, group))
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def sink_tile(problem: Problem) -> int:
    """Sinks of a tile, BS; 0 without sinks."""
    if not problem.sinks:
        return 0
    small = problem.query[3] > 128 or problem.dtype.itemsize > 2
    return min(padded(problem.sinks), 16 if small else 64)


def key_layout(problem: Problem) -> dict[str, bool]:
    """How the gradients of keys and values lie, as constants of the kernels that write them."""
    _, of_key, of_value = problem.grads_by_token
    return {"K_BY_TOKEN": of_key, "V_BY_TOKEN": of_value}


class TilePlan(NamedTuple):
    """How one kernel serves one band."""

    programs: int
    sizes: tuple[int, ...]
    """tiles, H, T, S, period, phase, first, last, mirror_first, mirror_last, sinks."""
    tiles: Tiles
    constants: Constants


def plan_tiles(kernel: str, problem: Problem, skip: bool, **flags: bool) -> TilePlan:
    """The plan of "forward", "backward query" or "backward key"."""
    pattern, of_key = problem.pattern, kernel == "backward key"
    batch, heads, queries, dim = problem.query
    groups, keys = problem.key[1:3]
    periods = pattern.periods if skip else (1,)
    length = keys if of_key else queries
    rows, wide = cdiv(length, min(periods)), problem.dtype.itemsize > 2
    lags = row_lags(pattern, skip, 0, keys)
    few = skip and lags[3] - lags[2] < MANY
    hopper = is_hopper(problem.device)
    tiles = choose_tiles(kernel, few, dim, rows, wide=wide, hopper=hopper, interpreted=INTERPRETED)
    # Queries leave out the residues that have none.
    residues = [period if of_key else min(period, length) for period in periods]
    count = max(r * cdiv(cdiv(length, period), tiles.rows) for r, period in zip(residues, periods, strict=True))
    sizes: dict[str, Any] = {"GROUP": heads // groups, "D": dim, "BD": padded(dim), "BM": tiles.rows, "BN": tiles.step}
    if of_key:
        sizes |= key_layout(problem)
    else:
        sizes |= {"BS": 0 if skip else sink_tile(problem), "BY_TOKEN": not skip and problem.out_by_token}
    if kernel == "backward query":
        sizes["Q_BY_TOKEN"] = problem.grads_by_token[0]
    if kernel != "forward":
        flags = {"SKIP": skip} | flags
    constants = Constants(
        {"num_warps": tiles.warps, "num_stages": tiles.stages},
        **sizes,
        RING=pattern.ring,
        SEGMENTS=0 if not problem.segments else BY_START.value if pattern.causal and not of_key else BY_TAG.value,
        SINKS=skip and problem.sinks > 0,
        PER_HEAD=skip and heads_differ(pattern),
        MIRROR=skip and not pattern.causal,
        **flags,
        SOFTCAP=problem.softcap,
        PRECISION=problem.precision,
    )
    programs = count * batch * (groups * key_classes(problem, skip) if of_key else heads)
    return TilePlan(programs, (count, heads, queries, keys, *lags, problem.sinks), tiles, constants)


def one_pass_rows(problem: Problem) -> int:
    """Rows before a tile that a one-pass backward kernel of the skip band needs; 0 where it does not serve.

    Its tiles have 64 rows, which must not be most of them beyond the end: residues of fewer than 32 rows take smaller
    tiles in two kernels.
    """
    pattern = problem.pattern
    if problem.key[2] // min(pattern.periods) < 32 and not INTERPRETED:
        return 0
    if problem.group > 1 or not pattern.causal or problem.query[3] > 128:
        return 0
    if problem.dtype.itemsize > 2 and not INTERPRETED:
        return 0
    most = max(last for _, _, _, last, *_ in skip_lags(pattern, problem.key[2])) - 1
    return padded(most) if 0 < most <= 32 else 0


def plan_one_pass(problem: Problem) -> TilePlan:
    """The plan of the one-pass backward kernel of the skip band."""
    pattern = problem.pattern
    batch, heads, queries, dim = problem.query
    keys = problem.key[2]
    rows = 32 if INTERPRETED else 64
    count = max(period * cdiv(cdiv(keys, period), rows) for period in pattern.periods)
    constants = Constants(
        {"num_warps": 4, "num_stages": 1},
        D=dim,
        BD=padded(dim),
        BM=rows,
        BP=one_pass_rows(problem),
        SEGMENTS=problem.segments,
        SINKS=problem.sinks > 0,
        PER_HEAD=heads_differ(pattern),
        SOFTCAP=problem.softcap,
        PRECISION=problem.precision,
    )
    sizes = (count, heads, queries, keys, *row_lags(pattern, True, 0, keys), problem.sinks)
    return TilePlan(count * batch * heads, sizes, Tiles(rows, rows, 4, 1), constants)


def key_classes(problem: Problem, skip: bool) -> int:
    """Classes of the query heads of a key head, each with a share of the gradients of keys and values."""
    if not skip or not heads_differ(problem.pattern):
        return 1
    return len(classes(problem.pattern, problem.group)[0])


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; (0, 0) of every other device.

    An AMD GPU of ROCm is called "cuda" as well, and may count its capability to 9 and more.
    """
    nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if nvidia else (0, 0)


@lru_cache(maxsize=16)
def is_hopper(device: torch.device) -> bool:
    """Whether this is an H100, an H200 or a sibling of theirs."""
    return capability(device) == (9, 0)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 4 where the kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache(maxsize=16)
def _has_descriptors(device: torch.device) -> bool:
    return device.type != "cuda" or capability(device) >= (9, 0)


def described(problem: Problem) -> bool:
    """Whether the tensor memory accelerator (Hopper and later) loads the local band's keys and values, if that pays.

    Its rows are neighbours. Below 2²⁴ elements of the query the kernels are short, and the host's 20 µs a descriptor
    cost more than they save.
    """
    batch, heads, queries, dim = problem.query
    if batch * heads * queries * dim < 1 << 24 and not INTERPRETED:
        return False
    if problem.pattern.ring or problem.dtype.itemsize != 2 or not problem.aligned:
        return False
    strides = problem.strides[4:]
    outer = strides[:3] + strides[4:7]
    return (
        strides[3] == strides[7] == 1 and all(s > 0 and s % 8 == 0 for s in outer) and _has_descriptors(problem.device)
    )
