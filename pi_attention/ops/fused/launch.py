"""Launch the kernels: allocate, and pass what the plan says. No arithmetic on the host, no synchronisation."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from pi_attention.ops.fused.compiled import Constants, Kernel, Step
from pi_attention.ops.fused.kernels.backward import (
    band_backward_key_kernel,
    band_backward_query_kernel,
    row_terms_kernel,
)
from pi_attention.ops.fused.kernels.decode import decode_kernel, join_kernel
from pi_attention.ops.fused.kernels.forward import band_forward_kernel
from pi_attention.ops.fused.kernels.sinks import sink_backward_kernel, sink_sum_kernel
from pi_attention.ops.fused.tiling import (
    BOTH,
    INTERPRETED,
    LOCAL,
    SKIP,
    Problem,
    TilePlan,
    band_table,
    described,
    heads_differ,
    key_classes,
    member_table,
    padded,
    plan_tiles,
    row_lags,
    sink_tile,
)

LOG2E = 1.4426950408889634

forward = Kernel(band_forward_kernel)
backward_query = Kernel(band_backward_query_kernel)
backward_key = Kernel(band_backward_key_kernel)
row_terms = Kernel(row_terms_kernel)
sink_backward = Kernel(sink_backward_kernel)
sink_sum = Kernel(sink_sum_kernel)
decode = Kernel(decode_kernel)
join = Kernel(join_kernel)


def on_device(device: torch.device) -> Any:
    """Kernels are launched on the current device: a context in which it is this one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def described_keys(key: Tensor, value: Tensor, block: list[int] | None) -> tuple[Any, Any]:
    """What the kernels load keys and values from: tensor descriptors where the plan has a block, else pointers."""
    if block is None:
        return key, value
    found = [TensorDescriptor(x, list(x.shape), list(x.stride()), block) for x in (key, value)]
    return found[0], found[1]


def _block(plan: TilePlan) -> list[int] | None:
    values = plan.constants.values
    return [1, 1, plan.tiles.step, values["BD"]] if values["DESCRIBED"] else None


class ForwardPlan(NamedTuple):
    """The launches of a forward pass; a band that is not asked for has none."""

    skip: Step | None
    local: Step | None
    bands: Tensor | None
    """`band_table`, where heads differ."""
    block: list[int] | None
    """Of the local band's tensor descriptors."""


def _table(problem: Problem, bands: int) -> Tensor | None:
    if bands == LOCAL or not heads_differ(problem.pattern):
        return None
    return band_table(problem.pattern, problem.key[2], problem.device)


@lru_cache(maxsize=1024)
def forward_plan(problem: Problem, bands: int) -> ForwardPlan:
    """The launches of a forward pass over both bands, or one."""

    def step(skip: bool, fuse: bool) -> tuple[Step, TilePlan]:
        flags = {"FUSE": fuse, "MASS": fuse and problem.mass, "GATED": fuse and problem.gate is not None}
        plan = plan_tiles("forward", problem, skip, **flags, DESCRIBED=not skip and described(problem))
        numbers = (*problem.gate_strides, *plan.sizes, problem.scale * LOG2E)
        return Step(forward, plan.programs, problem.strides, numbers, plan.constants), plan

    skip = None if bands == LOCAL else step(True, False)[0]
    if bands == SKIP:
        return ForwardPlan(skip, None, _table(problem, bands), None)
    local, plan = step(False, bands == BOTH)
    return ForwardPlan(skip, local, _table(problem, bands), _block(plan))


def run_forward(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, starts: Tensor | None, problem: Problem, bands: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """out [B, H, T, D] and log-sum-exp [B, H, T]; of both bands also the skip band's output and log-sum-exp."""
    plan = forward_plan(problem, bands)
    absent = query  # a pointer that no kernel reads
    starts = absent if starts is None else starts
    heads = absent if plan.bands is None else plan.bands
    skip_out = skip_lse = None
    with on_device(problem.device):
        if plan.skip is not None:
            skip_out, skip_lse = _outputs(query)
            fused = (skip_lse, skip_out, skip_lse, absent, absent)  # nothing to fuse with, no sinks
            plan.skip((query, key, value, starts, heads, *fused, skip_out, skip_lse))
            if plan.local is None:
                return skip_out, skip_lse, None, None
        assert plan.local is not None
        out, lse = _outputs(query)
        gates = lse if gate is None else gate
        other = (out, lse) if skip_out is None else (skip_out, skip_lse)
        keys = described_keys(key, value, plan.block)
        plan.local((query, *keys, starts, heads, gates, *other, key, value, out, lse))
    return out, lse, skip_out, skip_lse


def _outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)


class BackwardPlan(NamedTuple):
    """The launches of a backward pass, in order."""

    terms: Step
    skip: tuple[Step, Step] | None
    """Gradients of the queries, then of keys and values."""
    local: tuple[Step, Step] | None
    sinks: tuple[Step, Step] | None
    """Gradients of the sinks' keys and values by chunks of queries, and their sum."""
    bands: Tensor | None
    members: Tensor | None
    """`member_table`, where heads differ."""
    classes: int
    """Shares of the gradients of keys and values in the skip band, [B, classes, G, S, D]."""
    chunks: int
    block: list[int] | None


@lru_cache(maxsize=1024)
def backward_plan(
    problem: Problem, bands: int, grad_strides: tuple[int, ...], lse: bool, skip_lse: bool
) -> BackwardPlan:
    """The launches of a backward pass.

    Args:
        grad_strides: of the output's gradient.
        lse, skip_lse: whether the log-sum-exps have a gradient.
    """
    batch, heads, queries, dim = problem.query
    both, scales = bands == BOTH, (problem.scale, problem.scale * LOG2E)
    strides = problem.strides + grad_strides
    count = 1 if bands == LOCAL else key_classes(problem, True)

    def pair(skip: bool) -> tuple[tuple[Step, Step], TilePlan]:
        add = both and not skip
        query_plan = plan_tiles("backward query", problem, skip, ADD=add, DESCRIBED=not skip and described(problem))
        key_plan = plan_tiles("backward key", problem, skip, ADD=add)
        number = count if skip else 1
        steps = (
            Step(backward_query, query_plan.programs, strides, (*query_plan.sizes, *scales), query_plan.constants),
            Step(backward_key, key_plan.programs, strides, (*key_plan.sizes, number, *scales), key_plan.constants),
        )
        return steps, query_plan

    rows = 256 if INTERPRETED else 64
    constants = Constants(
        {"num_warps": 4},
        **{"D": dim, "BD": padded(dim), "BM": rows, "BOTH": both, "MASS": problem.mass},
        **{"GATED": problem.gate is not None, "LSE": lse, "SKIP_LSE": skip_lse},
    )
    total = batch * heads * queries
    numbers = (*problem.gate_strides, heads, queries, total)
    terms = Step(row_terms, cdiv(total, rows), grad_strides, numbers, constants)
    skip = None if bands == LOCAL else pair(True)[0]
    local, block = None, None
    if bands != SKIP:
        local, plan = pair(False)
        block = _block(plan)
    sinks, chunks = sink_steps(problem, strides) if local is not None and problem.sinks else (None, 0)
    differ = bands != LOCAL and heads_differ(problem.pattern)
    members = member_table(problem.pattern, problem.group, problem.device) if differ else None
    return BackwardPlan(terms, skip, local, sinks, _table(problem, bands), members, count, chunks, block)


def sink_steps(problem: Problem, strides: tuple[int, ...]) -> tuple[tuple[Step, Step], int]:
    """The launches for the sinks' keys and values, and the chunks of queries."""
    batch, heads, queries, dim = problem.query
    groups, keys = problem.key[1:3]
    chunk = 32 if INTERPRETED else 256 if queries <= 8192 else 1024 if problem.sinks <= 64 else 4096
    size, chunks = sink_tile(problem), cdiv(queries, chunk)
    small = dim > 128 or problem.dtype.itemsize > 2
    rows = 16 if INTERPRETED else 32 if small else 64
    programs = chunks * cdiv(problem.sinks, size) * batch * groups
    window = row_lags(problem.pattern, False, 0, keys)[3]
    shared = {"D": dim, "BD": padded(dim)}
    constants = Constants(
        {"num_warps": 4, "num_stages": 1 if small else 2},
        **{"GROUP": problem.group, **shared, "BM": rows, "BS": size, "CHUNK": chunk},
        **{"SEGMENTS": problem.segments, "PRECISION": problem.precision},
    )
    numbers = (chunks, heads, queries, keys, window, problem.sinks, problem.scale, problem.scale * LOG2E)
    add = Step(sink_backward, programs, strides, numbers, constants)
    constants = Constants({"num_warps": 4}, **shared, BS=size, SEGMENTS=problem.segments)
    return (add, Step(sink_sum, programs, (), (chunks, groups, keys, problem.sinks), constants)), chunks


class Saved(NamedTuple):
    """What a forward pass leaves for the backward pass; of the skip band only when both were computed."""

    out: Tensor
    lse: Tensor
    skip_out: Tensor | None
    skip_lse: Tensor | None


def run_backward(
    grads: tuple[Tensor, Tensor | None, Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    starts: Tensor | None,
    saved: Saved,
    problem: Problem,
    bands: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and gate logits (fp32; None without a gate).

    Args:
        grads: of the output and of both log-sum-exps, None where one has no gradient.
    """
    grad_out, grad_lse, grad_skip_lse = grads
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    if grad_skip_lse is not None:
        grad_skip_lse = grad_skip_lse.contiguous()
    plan = backward_plan(problem, bands, grad_out.stride(), grad_lse is not None, grad_skip_lse is not None)
    absent = query  # a pointer that no kernel reads
    where = absent if starts is None else starts
    heads = absent if plan.bands is None else plan.bands
    out, lse = saved.out, saved.lse
    skip_out = out if saved.skip_out is None else saved.skip_out
    skip_lse = lse if saved.skip_lse is None else saved.skip_lse
    terms = torch.empty(4, *lse.shape, dtype=torch.float32, device=query.device)
    grad_gate = None if gate is None else torch.empty_like(lse)
    grad_query, grad_key, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    tensors = (query, key, value, where, heads)
    with on_device(problem.device):
        plan.terms(
            (
                *(grad_out, out, skip_out, lse, skip_lse, lse if grad_lse is None else grad_lse),
                *(skip_lse if grad_skip_lse is None else grad_skip_lse, lse if gate is None else gate),
                *(terms, terms if grad_gate is None else grad_gate),
            )
        )
        if plan.skip is not None:
            members = absent if plan.members is None else plan.members
            weight, shift = (terms[2], terms[3]) if plan.local is not None else (terms[0], terms[1])
            rows = (grad_out, skip_lse, weight, shift)
            of_query, of_key = plan.skip
            of_query((*tensors, *rows, absent, absent, grad_query))
            if plan.classes == 1:
                of_key((*tensors, members, *rows, grad_key, grad_value))
            else:
                batch, groups, length, dim = key.shape
                shares = query.new_empty(2, batch, plan.classes, groups, length, dim, dtype=torch.float32)
                of_key((*tensors, members, *rows, shares[0], shares[1]))
                grad_key.copy_(shares[0].sum(dim=1))
                grad_value.copy_(shares[1].sum(dim=1))
        if plan.local is not None:
            rows = (grad_out, lse, terms[0], terms[1])
            of_query, of_key = plan.local
            keys = described_keys(key, value, plan.block)
            of_query((query, *keys, where, heads, *rows, key, value, grad_query))
            of_key((*tensors, absent, *rows, grad_key, grad_value))
            if plan.sinks is not None:
                batch, groups, _, dim = key.shape
                shape = (2, batch, groups, plan.chunks, problem.sinks, dim)
                shares = torch.empty(shape, dtype=torch.float32, device=query.device)
                owner = torch.empty(batch, plan.chunks, dtype=torch.int32, device=query.device)
                add, together = plan.sinks
                add((query, key, value, where, *rows, grad_key, grad_value, shares[0], shares[1], owner))
                together((shares[0], shares[1], owner, where, grad_key, grad_value))
    return grad_query, grad_key, grad_value, grad_gate


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


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
        PRECISION=problem.precision,
    )


@lru_cache(maxsize=1024)
def decode_plan(problem: Problem) -> DecodePlan:
    """Two programs a multiprocessor, each with at least 32 keys of the window; a second kernel joins their parts."""
    batch, heads, queries, dim = problem.query
    keys, pattern = problem.key[2], problem.pattern
    window = min(pattern.window, keys)
    programs = batch * (heads if heads_differ(pattern) else heads // problem.group)
    splits = min(cdiv(2 * _multiprocessors(problem.device), programs), cdiv(window + queries - 1, 32), 64)
    lags = row_lags(pattern, True, 0, keys)
    numbers = (splits, heads, queries, keys, *lags, problem.sinks, window, problem.scale * LOG2E)
    parts = Step(decode, programs * splits, problem.strides, numbers, decode_constants(problem))
    constants = Constants(
        {"num_warps": 4},
        **{"D": dim, "BD": padded(dim), "BS": triton.next_power_of_2(splits)},
        **{"MASS": problem.mass, "GATED": problem.gate is not None},
    )
    rows = batch * heads * queries
    together = Step(join, rows, (), (*problem.gate_strides, rows, heads, queries, splits), constants)
    return DecodePlan(parts, together, splits, _table(problem, BOTH))


def run_decode(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, starts: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, T, D] of both bands with sinks, log-sum-exps [B, H, T] of the local and of the skip band."""
    plan = decode_plan(problem)
    parts = torch.empty(2, plan.splits, *query.shape, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(2, plan.splits, *query.shape[:3], dtype=torch.float32, device=query.device)
    out, lse = _outputs(query)
    skip_lse = torch.empty_like(lse)
    absent = query
    with on_device(problem.device):
        starts = absent if starts is None else starts
        bands = absent if plan.bands is None else plan.bands
        plan.parts((query, key, value, starts, bands, parts, part_lse))
        plan.join((parts, part_lse, lse if gate is None else gate, out, lse, skip_lse))
    return out, lse, skip_lse
