"""Launch the kernels: allocate, and pass what the plan says. No arithmetic on the host, no synchronisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton import cdiv

from pi_attention.ops.triton.backward import band_backward_key_kernel, band_backward_query_kernel, row_terms_kernel
from pi_attention.ops.triton.decode import decode_kernel, join_kernel
from pi_attention.ops.triton.forward import band_forward_kernel
from pi_attention.ops.triton.launcher import Constants, Launcher
from pi_attention.ops.triton.plan import INTERPRETED, Launch, has_periods, padded, precision, row_lags

LOG2E = 1.4426950408889634

forward = Launcher(band_forward_kernel)
backward_query = Launcher(band_backward_query_kernel)
backward_key = Launcher(band_backward_key_kernel)
row_terms = Launcher(row_terms_kernel)
decode = Launcher(decode_kernel)
join = Launcher(join_kernel)


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
    rows = 256 if INTERPRETED else 64
    return Constants({"num_warps": 4}, D=dim, BD=padded(dim), BM=rows, BOTH=both, MASS=mass, GATED=gated)


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
def _decode_constants(
    group: int, dim: int, queries: int, segments: bool, per_head: bool, precision: str, row_bytes: int
) -> Constants:
    rows = (1 if per_head else group) * queries
    wide = row_bytes >= 1024  # 64 such query rows alone fill two thirds of a consumer GPU's shared memory
    return Constants(
        {"num_warps": 4, "num_stages": 1 if wide else 2},
        GROUP=group,
        D=dim,
        BD=padded(dim),
        BM=padded(rows),
        BN=16 if wide else 32,
        SEGMENTS=segments,
        PER_HEAD=per_head,
        PRECISION=precision,
    )


@lru_cache(maxsize=256)
def _join_constants(dim: int, splits: int, mass: bool, gated: bool) -> Constants:
    parts = triton.next_power_of_2(splits)
    return Constants({"num_warps": 4}, D=dim, BD=padded(dim), BS=parts, MASS=mass, GATED=gated)


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
    window = min(pattern.window, keys)
    per_head = has_periods(pattern)
    programs = batch * (heads if per_head else heads // launch.group)
    splits = min(cdiv(2 * _multiprocessors(query.device), programs), cdiv(window + length - 1, 32), 64)
    parts = torch.empty(2, splits, batch, heads, length, dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(2, splits, batch, heads, length, dtype=torch.float32, device=query.device)
    segments = launch.starts is not None
    decode(
        programs * splits,
        (query, launch.key, launch.value, *launch.others(), parts, part_lse),
        launch.strides(),
        (
            *(splits, heads, length, keys, *row_lags(pattern, True, 0, keys), min(pattern.sinks, keys)),
            *(window, launch.scale * LOG2E),
        ),
        _decode_constants(
            launch.group, dim, length, segments, per_head, precision(query), padded(dim) * query.element_size()
        ),
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
