"""When the Hopper kernels serve a call, and their launches: they take the places of the Triton kernels in a plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton import cdiv
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pi_attention.ops.fused.compiled import Constants, Kernel, Step
from pi_attention.ops.fused.hopper.forward import forward_kernel
from pi_attention.ops.fused.hopper.key import key_kernel
from pi_attention.ops.fused.hopper.query import query_kernel
from pi_attention.ops.fused.tiling import Problem, heads_differ, most_lags, multiprocessors, skip_lags

LOG2E = 1.4426950408889634
BM = BN = 64
"""Rows of a consumer; rows of the other side at a time."""

OPTIONS = {"num_warps": 4, "maxnreg": 168}
"""Three warpgroups share the registers: 240 a thread for each consumer, 24 for the producer."""

STAGES = {"forward": 4, "query": 3, "key": 2}
"""Tiles that are loaded ahead."""


def stages(kernel: str, dim: int) -> int:
    """Tiles that a kernel loads ahead; at D = 64 there is room for one more of the key kernel's."""
    return STAGES[kernel] + (kernel == "key" and dim == 64)


FORWARD, QUERY, KEY = Kernel(forward_kernel), Kernel(query_kernel), Kernel(key_kernel)

HEADS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)
ROWS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def _tile(x: Tensor, rows: int, period: int) -> TensorDescriptor:
    """Of [B, H, T, D], `rows` rows of one residue of one head at a time; the period divides T."""
    batch, heads, length, dim = x.shape
    of_batch, of_head, of_token, of_feature = x.stride()
    shape = [batch, heads, period, length // period, dim]
    strides = [of_batch, of_head, of_token, period * of_token, of_feature]
    return TensorDescriptor(x, shape, strides, [1, 1, 1, rows, dim], HEADS)


def _row(x: Tensor) -> TensorDescriptor:
    """Of row vectors [heads, T], BN of one head at a time."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, BN], ROWS)


def _lags(problem: Problem, skip: bool) -> tuple[int, int, int, int, int]:
    """Period, phase and row lags [first, last) of the band, of the first head; and the most lags of a head."""
    keys = problem.key[2]
    if not skip:
        window = min(problem.pattern.window, keys)
        return 1, 0, 0, window, window
    bands = skip_lags(problem.pattern, keys)
    return *bands[0][:4], most_lags(bands)


def _step(
    kernel: Kernel, problem: Problem, sizes: tuple[int, ...], scales: tuple[float, ...], skip: bool, **flags: int
) -> Step:
    """A launch of `kernel`; `sizes` begin with the heads and the length that are cut into tiles."""
    heads, length = sizes[:2]
    name = kernel.kernel.__name__.removesuffix("_kernel")
    *lags, span = _lags(problem, skip)
    tiles = lags[0] * cdiv(length // lags[0], 2 * BM)
    total = tiles * heads * problem.query[0]
    dim = problem.query[3]
    shape = {"GROUP": problem.group, "D": dim, "BM": BM, "BN": BN, "STAGES": stages(name, dim)}
    flags = {"SKIP": skip, "PER_HEAD": skip and heads_differ(problem.pattern)} | flags
    lengths = (problem.query[1], problem.query[2], problem.key[2])
    most = (span,) if name == "key" else ()
    numbers = (*sizes[2:], total, tiles, *lengths, *lags, *most, problem.sinks, *scales)
    programs = min(total, multiprocessors(problem.device))
    return Step(kernel, programs, (), numbers, Constants(OPTIONS, **shape, SEGMENTS=problem.segments, **flags))


class Forward:
    """The forward pass of one band, of the local one with the fusion; takes what `band_forward_kernel` takes."""

    def __init__(self, problem: Problem, skip: bool) -> None:
        fuse = problem.both and not skip
        flags = {"FUSE": fuse, "MASS": fuse and problem.mass, "GATED": fuse and problem.gate is not None}
        _, heads, queries, _ = problem.query
        scales = (problem.scale * LOG2E,)
        self.step = _step(FORWARD, problem, (heads, queries, *problem.gate_strides), scales, skip, **flags)
        self.skip, self.period = skip, _lags(problem, skip)[0]

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Query, key, value, starts, bands, gate, skip output, its log-sum-exp, –, –, output, log-sum-exp."""
        query, key, value, starts, bands, gate, skip_out, skip_lse, _, _, out, lse = tensors
        tiled = ((query, 2 * BM), (key, BN), (value, BN), (skip_out, 2 * BM), (out, BM))
        tiles = (_tile(x, rows, self.period) for x, rows in tiled)
        self.step((*tiles, starts, bands, gate, skip_lse, lse))


class Query:
    """The gradient of the queries in one band, of the local one with the row terms.

    Takes what `band_backward_query_kernel` takes.
    """

    def __init__(self, problem: Problem, lse: bool, skip_lse: bool, skip: bool) -> None:
        batch, heads, queries, _ = problem.query
        fuse = problem.both and not skip
        # The outputs of two bands pass through the L1 cache, for which two tiles of queries leave too little.
        flags: dict[str, int] = {"QUERIES": 1 if fuse else 2, "BY_TOKEN": not skip and problem.out_by_token}
        flags |= {"BOTH": fuse, "MASS": fuse and problem.mass, "GATED": fuse and problem.gate is not None}
        flags |= {"LSE": lse and not skip, "SKIP_LSE": skip_lse and not skip}
        sizes = (heads, queries, *problem.gate_strides, batch * heads * queries)
        scales = (problem.scale, problem.scale * LOG2E)
        self.step = _step(QUERY, problem, sizes, scales, skip, **flags)
        self.skip, self.period = skip, _lags(problem, skip)[0]

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Query, key, value, starts, bands, output's gradient, log-sum-exp, terms, –, –, query's gradient, rows."""
        query, key, value, starts, bands, grad_out, lse, terms, _, _, grad_query, *rest = tensors
        tiled = ((query, 2 * BM), (key, BN), (value, BN), (grad_out, 2 * BM), (grad_query, BM))
        tiles = (_tile(x, rows, self.period) for x, rows in tiled)
        self.step((*tiles, starts, bands, lse, terms, grad_query, *rest))


class Key:
    """The gradients of keys and values of one band; takes the tensors that `band_backward_key_kernel` takes."""

    def __init__(self, problem: Problem, skip: bool) -> None:
        groups, keys = problem.key[1:3]
        scales = (problem.scale, problem.scale * LOG2E)
        self.step = _step(KEY, problem, (groups, keys), scales, skip, ADD=problem.both and not skip)
        self.skip, (self.period, phase, first, *_) = skip, _lags(problem, skip)
        self.nearest = 0 if heads_differ(problem.pattern) else phase + self.period * first
        """How far back the nearest skip is, never 0; 0 where heads differ, and the table of bands says it."""

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Query, key, value, starts, bands, –, output's gradient, log-sum-exp, terms, gradients of key and value."""
        query, key, value, starts, bands, _, grad_out, lse, terms, grad_key, grad_value = tensors
        if self.skip:
            nearest = self.nearest or (bands[:, 1:2] + self.period * bands[:, 2:3])
            lse, terms = _of_keys(lse, terms[2:], self.period, nearest)
        tiled = ((query, BN), (grad_out, BN), (key, 2 * BM), (value, 2 * BM), (grad_key, BM), (grad_value, BM))
        tiles = (_tile(x, rows, self.period) for x, rows in tiled)
        length = lse.shape[-1]
        self.step((*tiles, _row(lse.view(-1, length)), _row(terms.view(-1, length)), starts, bands))


def _of_keys(lse: Tensor, terms: Tensor, period: int, nearest: Tensor | int) -> tuple[Tensor, Tensor]:
    """Row vectors [B, H, T] and [2, B, H, T] of the first query that sees each key, by residues of the keys; else zero.

    Args:
        lse, terms: in the order of the queries.
        period: of the skips.
        nearest: how far back the nearest skip is; [H, 1] where heads differ.

    Returns:
        [B, H, period, T / period], and as many twice.
    """
    length = lse.shape[-1]
    key = torch.arange(length, device=lse.device).view(-1, period).T.reshape(-1)
    vectors = torch.nn.functional.pad(torch.cat([lse[None], terms]), (0, 1))
    query = (key + nearest).clamp(max=length).expand(*vectors.shape[:-1], -1)
    found = vectors.gather(-1, query).unflatten(-1, (period, -1))
    return found[0], found[1:]
