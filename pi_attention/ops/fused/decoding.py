"""Launch the kernels of a decoding step: parts of the keys, then their joining."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import cdiv

from pi_attention.ops.fused.compiled import Constants, Kernel, Step
from pi_attention.ops.fused.kernels.decode import decode_kernel, join_kernel
from pi_attention.ops.fused.launch import LOG2E, on_device, one_a_head, rows_like, table_of
from pi_attention.ops.fused.layout import empty_as
from pi_attention.ops.fused.tiling import Problem, heads_differ, most_lags, multiprocessors, padded, skip_lags
from pi_attention.pattern import PiPattern

decode = Kernel(decode_kernel)
join = Kernel(join_kernel)


class DecodePlan(NamedTuple):
    """The two launches of a decoding step: parts of the keys, and their joining."""

    parts: Step
    join: Step
    splits: int
    bands: Tensor | None


def decode_constants(problem: Problem) -> Constants:
    """Compile-time constants of the decoding kernel."""
    queries, dim = problem.query[2:]
    per_head = heads_differ(problem.pattern)
    wide = padded(dim) * problem.dtype.itemsize >= 1024  # 64 such query rows fill two thirds of a small shared memory
    return Constants(
        {"num_warps": 4, "num_stages": 1 if wide else 2},
        GROUP=problem.group,
        D=dim,
        BD=padded(dim),
        BM=padded((1 if per_head else problem.group) * queries),
        BN=16 if wide else 32,
        SEGMENTS=problem.segments,
        PER_HEAD=per_head,
        SOFTCAP=problem.softcap,
        PRECISION=problem.precision,
        PAGED=problem.paged,
    )


def table_length(pattern: PiPattern, keys: int) -> int:
    """For how many keys, these or more, the table of the heads' lags is made: one more token needs no new table.

    The kernel leaves out lags that reach beyond the first key.
    """
    if pattern.ring or not pattern.causal:
        return keys
    if pattern.reach is not None:
        return pattern.reach + 1
    eighth = max(64, (1 << keys.bit_length()) // 16)
    return cdiv(keys, eighth) * eighth


@lru_cache(maxsize=1024)
def decode_plan(problem: Problem) -> DecodePlan:
    """Two programs a multiprocessor, each with at least 32 keys of the longest list; a second kernel joins their parts.

    The lists are those of the window, and of every query's skips and sinks.
    """
    batch, heads, queries, dim = problem.query
    keys, pattern = problem.key[2], problem.pattern
    window = min(pattern.window, keys)
    programs = batch * (heads if heads_differ(pattern) else heads // problem.group)
    bands = skip_lags(pattern, keys)
    longest = max(window + queries - 1, queries * most_lags(bands), queries * problem.sinks)
    splits = min(cdiv(2 * multiprocessors(problem.device), programs), cdiv(longest, 32), 64)
    numbers = (splits, heads, queries, keys, *bands[0], problem.sinks, window, problem.scale * LOG2E)
    parts = Step(decode, programs * splits, problem.strides, numbers, decode_constants(problem))
    constants = Constants(
        {"num_warps": 4},
        **{"D": dim, "BD": padded(dim), "BS": triton.next_power_of_2(splits)},
        **{"MASS": problem.mass, "GATED": problem.gate is not None, "SINK_LOGIT": problem.sink_logit},
    )
    rows = batch * heads * queries
    numbers = (*problem.gate_strides, rows, heads, queries, splits)
    together = Step(join, rows, (), numbers, constants, absent=0 if problem.sink_logit else 1)
    return DecodePlan(parts, together, splits, table_of(problem, table_length(pattern, keys)))


def run_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    starts: Tensor | None,
    sink_logit: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, T, D] of both bands with sinks, log-sum-exps [B, H, T] of the local and of the skip band.

    Where keys are paged, `starts` is the table of the kernel, and key and value are [B, G, slots, D] with a stride of 0
    along B.
    """
    plan = decode_plan(problem)
    parts = torch.empty(2, plan.splits, *query.shape, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(2, plan.splits, *query.shape[:3], dtype=torch.float32, device=query.device)
    out, lse = empty_as(query), rows_like(query)
    skip_lse = torch.empty_like(lse)
    absent = query
    with on_device(problem.device):
        starts = absent if starts is None else starts
        bands = absent if plan.bands is None else plan.bands
        plan.parts((query, key, value, starts, bands, parts, part_lse))
        plan.join((parts, part_lse, lse if gate is None else gate, out, lse, skip_lse, *one_a_head(sink_logit)))
    return out, lse, skip_lse
