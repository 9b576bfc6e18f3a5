"""Launch the kernels of whole sequences, forward and backward: allocate, and pass what the plan says.

No arithmetic on the host, no synchronisation.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from pi_attention.ops.fused.compiled import Constants, Kernel, Launch, Step
from pi_attention.ops.fused.hopper.serves import serves
from pi_attention.ops.fused.kernels.backward import (
    band_backward_key_kernel,
    band_backward_query_kernel,
)
from pi_attention.ops.fused.kernels.forward import band_forward_kernel
from pi_attention.ops.fused.kernels.one_pass import skip_backward_kernel
from pi_attention.ops.fused.kernels.sinks import sink_backward_kernel, sink_sum_kernel
from pi_attention.ops.fused.layout import dense_strides, empty_as, empty_result, laid_out
from pi_attention.ops.fused.tiling import (
    INTERPRETED,
    Problem,
    TilePlan,
    band_table,
    described,
    heads_differ,
    key_classes,
    key_layout,
    member_table,
    one_pass_rows,
    padded,
    plan_one_pass,
    plan_tiles,
    row_lags,
    sink_tile,
)

LOG2E = 1.4426950408889634
HERE = nullcontext()

forward = Kernel(band_forward_kernel)
backward_query = Kernel(band_backward_query_kernel)
backward_key = Kernel(band_backward_key_kernel)
skip_backward = Kernel(skip_backward_kernel)
sink_backward = Kernel(sink_backward_kernel)
sink_sum = Kernel(sink_sum_kernel)


def on_device(device: torch.device) -> Any:
    """Kernels are launched on the current device: a context in which it is this one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return HERE
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
    """The launches of a forward pass, in order."""

    skip: Launch | None
    """None for a pattern without skips."""
    local: Launch
    block: list[int] | None
    """Of the local band's tensor descriptors."""
    bands: Tensor | None
    """`band_table`, where heads differ."""
    out: tuple[int, ...]
    """Strides of the output."""


def table_of(problem: Problem, length: int | None = None) -> Tensor | None:
    """`band_table` for so many keys, those of the problem when None; None where heads do not differ."""
    if not heads_differ(problem.pattern):
        return None
    return band_table(problem.pattern, problem.key[2] if length is None else length, problem.device)


@lru_cache(maxsize=1024)
def forward_plan(problem: Problem) -> ForwardPlan:
    """The launches of a forward pass: the skip band, then the local band, which takes it in."""

    def of(skip: bool) -> tuple[Launch, list[int] | None]:
        if serves("forward", problem, skip):
            from pi_attention.ops.fused.hopper.launch import Forward

            return Forward(problem, skip), None
        fuse = problem.both and not skip
        flags = {"FUSE": fuse, "MASS": fuse and problem.mass, "GATED": fuse and problem.gate is not None}
        flags["SINK_LOGIT"] = problem.sink_logit and not skip
        plan = plan_tiles("forward", problem, skip, **flags, DESCRIBED=not skip and described(problem))
        numbers = (*problem.gate_strides, *plan.sizes, problem.scale * LOG2E)
        absent = 0 if flags["SINK_LOGIT"] else 1
        return Step(forward, plan.programs, problem.strides, numbers, plan.constants, absent), _block(plan)

    skip = of(True)[0] if problem.both else None
    return ForwardPlan(skip, *of(False), table_of(problem), dense_strides(problem.query, problem.out_by_token))


def run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    starts: Tensor | None,
    sink_logit: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """out [B, H, T, D], which lies as the query, and log-sum-exp [B, H, T]; then those of the skip band, if any."""
    plan = forward_plan(problem)
    absent = query  # a pointer that no kernel reads
    starts = absent if starts is None else starts
    out, lse, skip_out, skip_lse = empty_result(query, plan.out), rows_like(query), None, None
    with on_device(problem.device):
        if plan.skip is not None:
            skip_out, skip_lse = empty_as(query), torch.empty_like(lse)
            heads = absent if plan.bands is None else plan.bands
            nothing = (skip_lse, skip_out, skip_lse, absent, absent)  # to fuse with, and no sinks
            plan.skip((query, key, value, starts, heads, *nothing, skip_out, skip_lse))
        gates = lse if gate is None else gate
        other = (out, lse) if skip_out is None else (skip_out, skip_lse)
        keys = described_keys(key, value, plan.block)
        plan.local((query, *keys, starts, absent, gates, *other, key, value, out, lse, *one_a_head(sink_logit)))
    return out, lse, skip_out, skip_lse


def rows_like(query: Tensor) -> Tensor:
    """Memory for a log-sum-exp [B, H, T], its own: the outputs of a registered operator must not share any."""
    return torch.empty(*query.shape[:3], dtype=torch.float32, device=query.device)


def one_a_head(sink_logit: Tensor | None) -> tuple[Tensor, ...]:
    """A sink logit [H], if any, as the kernels read it: compiled for one dtype and stride, whatever its own are."""
    return () if sink_logit is None else (sink_logit.to(torch.float32).contiguous(),)


class BackwardPlan(NamedTuple):
    """The launches of a backward pass, in order."""

    query: Launch
    """The local band's gradient of the queries, with the terms of every row and the gradient of the gate."""
    one_pass: Step | None
    """All gradients of the skip band; where that kernel serves, else the next two."""
    skip: tuple[Launch, Launch] | None
    """The skip band's gradients of the queries, then of keys and values."""
    key: Launch
    """The local band's gradients of keys and values."""
    sinks: tuple[Step, Step] | None
    """Gradients of the sinks' keys and values by chunks of queries, and their sum."""
    bands: Tensor | None
    members: Tensor | None
    """`member_table`, where heads differ."""
    classes: int
    """Shares of the gradients of keys and values in the skip band, [B, classes, G, S, D]."""
    chunks: int
    block: list[int] | None
    out: tuple[int, ...]
    """Strides of the output."""
    grads: tuple[tuple[int, ...], ...]
    """Strides of the gradients of query, key and value."""


@lru_cache(maxsize=1024)
def backward_plan(
    problem: Problem, grad_strides: tuple[int, ...], lse: bool, skip_lse: bool, aligned: bool = True
) -> BackwardPlan:
    """The launches of a backward pass.

    Args:
        grad_strides: of the output's gradient.
        lse, skip_lse: whether the log-sum-exps have a gradient.
        aligned: whether the output's gradient starts at a multiple of 16 bytes.
    """
    batch, heads, queries, _ = problem.query
    scales, strides = (problem.scale, problem.scale * LOG2E), problem.strides + grad_strides
    rows, both = batch * heads * queries, problem.both
    flags = {"MASS": problem.mass, "GATED": problem.gate is not None, "LSE": lse, "SKIP_LSE": skip_lse}
    flags["SINK_LOGIT"] = problem.sink_logit

    def of_query(skip: bool) -> tuple[Launch, list[int] | None]:
        if aligned and serves("query", problem, skip, grad_strides):
            from pi_attention.ops.fused.hopper.launch import Query

            return Query(problem, lse, skip_lse, skip), None
        plan = plan_tiles(
            "backward query", problem, skip, ADD=skip, BOTH=both, **flags, DESCRIBED=not skip and described(problem)
        )
        numbers = (*problem.gate_strides, rows, *plan.sizes, *scales)
        absent = 0 if problem.sink_logit else 2
        return Step(backward_query, plan.programs, strides, numbers, plan.constants, absent), _block(plan)

    def of_key(skip: bool, classes: int) -> Launch:
        if aligned and serves("key", problem, skip, grad_strides):
            from pi_attention.ops.fused.hopper.launch import Key

            return Key(problem, skip)
        plan = plan_tiles("backward key", problem, skip, ADD=both and not skip)
        return Step(backward_key, plan.programs, strides, (rows, *plan.sizes, classes, *scales), plan.constants)

    classes = key_classes(problem, both)
    one_pass = skip = members = None
    if both and one_pass_rows(problem):
        plan = plan_one_pass(problem)
        one_pass = Step(skip_backward, plan.programs, strides, (rows, *plan.sizes, *scales), plan.constants)
    elif both:
        skip = of_query(True)[0], of_key(True, classes)
    if heads_differ(problem.pattern):
        members = member_table(problem.pattern, problem.group, problem.device)
    sinks, chunks = sink_steps(problem, strides) if problem.sinks else (None, 0)
    query, block = of_query(False)
    shapes = zip((problem.query, problem.key, problem.key), problem.grads_by_token, strict=True)
    layout = dense_strides(problem.query, problem.out_by_token), tuple(dense_strides(*shape) for shape in shapes)
    tables, shares = (table_of(problem), members), (classes, chunks)
    return BackwardPlan(query, one_pass, skip, of_key(False, 1), sinks, *tables, *shares, block, *layout)


def sink_steps(problem: Problem, strides: tuple[int, ...]) -> tuple[tuple[Step, Step], int]:
    """The launches for the sinks' keys and values, and the chunks of queries."""
    batch, heads, queries, dim = problem.query
    groups, keys = problem.key[1:3]
    chunk = 32 if INTERPRETED else 256 if queries <= 8192 else 1024 if problem.sinks <= 64 else 4096
    size, chunks = min(32, sink_tile(problem)), cdiv(queries, chunk)
    small = dim > 128 or problem.dtype.itemsize > 2
    rows = 16 if INTERPRETED else 32 if small else 64
    programs = chunks * cdiv(problem.sinks, size) * batch * groups
    window = row_lags(problem.pattern, False, 0, keys)[3]
    shared = {"D": dim, "BD": padded(dim)}
    layout = key_layout(problem)
    constants = Constants(
        {"num_warps": 4, "num_stages": 1 if small else 2},
        **{"GROUP": problem.group, **shared, "BM": rows, "BS": size, "CHUNK": chunk, **layout},
        **{"SEGMENTS": problem.segments, "SOFTCAP": problem.softcap, "PRECISION": problem.precision},
    )
    scales = (problem.scale, problem.scale * LOG2E)
    numbers = (batch * heads * queries, chunks, heads, queries, keys, window, problem.sinks, *scales)
    add = Step(sink_backward, programs, strides, numbers, constants)
    constants = Constants({"num_warps": 4}, **shared, BS=size, **layout, SEGMENTS=problem.segments)
    return (add, Step(sink_sum, programs, (), (chunks, groups, keys, problem.sinks), constants)), chunks


class Saved(NamedTuple):
    """What a forward pass leaves for the backward pass; of the skip band None without one."""

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
    sink_logit: Tensor | None,
    saved: Saved,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, gate logits and sink logit, in their dtypes; None without one of the last two.

    The first three lie as what they belong to; with skips they lie head by head.

    Args:
        grads: of the output and of both log-sum-exps, None where one has no gradient.
    """
    grad_out, grad_lse, grad_skip_lse = grads
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_skip_lse = None if grad_skip_lse is None else grad_skip_lse.contiguous()
    aligned = not grad_out.data_ptr() & 15
    plan = backward_plan(problem, grad_out.stride(), grad_lse is not None, grad_skip_lse is not None, aligned)
    absent = query  # a pointer that no kernel reads
    starts = absent if starts is None else starts
    of_query, of_key, of_value = plan.grads
    out, lse = laid_out(saved.out, plan.out), saved.lse.contiguous()
    skip_out = out if saved.skip_out is None else saved.skip_out.contiguous()
    skip_lse = lse if saved.skip_lse is None else saved.skip_lse.contiguous()
    terms = torch.empty(4, *lse.shape, dtype=torch.float32, device=query.device)
    grad_gate = None if gate is None else empty_as(gate)
    of_sink: tuple[Tensor, ...] = () if sink_logit is None else (torch.empty_like(lse),)
    grad_query = empty_result(query, of_query)
    grad_key, grad_value = empty_result(key, of_key), empty_result(value, of_value)
    of_rows = (
        *(out, skip_out, skip_lse, lse if grad_lse is None else grad_lse),
        *(lse if grad_skip_lse is None else grad_skip_lse, lse if gate is None else gate),
        *(terms if grad_gate is None else grad_gate, *one_a_head(sink_logit), *of_sink),
    )
    with on_device(problem.device):
        keys = described_keys(key, value, plan.block)
        plan.query((query, *keys, starts, absent, grad_out, lse, terms, key, value, grad_query, *of_rows))
        if problem.both:
            heads = absent if plan.bands is None else plan.bands
            tensors, rows = (query, key, value, starts, heads), (grad_out, skip_lse, terms)
            members = absent if plan.members is None else plan.members
            shares = [grad_key, grad_value]
            if plan.classes > 1:
                batch, groups, length, dim = key.shape
                shares = [key.new_empty(batch, plan.classes, groups, length, dim, dtype=torch.float32) for _ in shares]
            if plan.one_pass is not None:
                plan.one_pass((*tensors, *rows, grad_query, grad_key, grad_value))
            else:
                assert plan.skip is not None
                plan.skip[0]((*tensors, *rows, absent, absent, grad_query, *of_rows))
                plan.skip[1]((*tensors, members, *rows, *shares))
            if plan.classes > 1:
                grad_key.copy_(shares[0].sum(dim=1))
                grad_value.copy_(shares[1].sum(dim=1))
        plan.key((query, key, value, starts, absent, absent, grad_out, lse, terms, grad_key, grad_value))
        if plan.sinks is not None:
            batch, groups, _, dim = key.shape
            shape = (2, batch, groups, plan.chunks, problem.sinks, dim)
            share_key, share_value = torch.empty(shape, dtype=torch.float32, device=query.device)
            owner = torch.empty(batch, plan.chunks, dtype=torch.int32, device=query.device)
            add, together = plan.sinks
            share = (share_key, share_value, owner)
            add((query, key, value, starts, grad_out, lse, terms, grad_key, grad_value, *share))
            together((*share, starts, grad_key, grad_value))
    grad_sink = None if sink_logit is None else of_sink[0].sum(dim=(0, 2)).to(sink_logit.dtype)
    return grad_query, grad_key, grad_value, grad_gate, grad_sink
