"""When the Hopper kernels serve a call, and their launches: they take the places of the Triton kernels in a plan."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from triton import cdiv
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pi_attention.ops.fused.compiled import Constants, Kernel, Step
from pi_attention.ops.fused.hopper.forward import forward_kernel
from pi_attention.ops.fused.hopper.key import key_kernel
from pi_attention.ops.fused.hopper.query import query_kernel
from pi_attention.ops.fused.tiling import Problem, multiprocessors

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

HEADS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
ROWS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def _tile(x: Tensor, rows: int) -> TensorDescriptor:
    """Of [B, H, T, D], `rows` rows of one head at a time."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, x.shape[3]], HEADS)


def _row(x: Tensor) -> TensorDescriptor:
    """Of row vectors [heads, T], BN of one head at a time."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, BN], ROWS)


def _step(kernel: Kernel, problem: Problem, sizes: tuple[int, ...], scales: tuple[float, ...], **flags: bool) -> Step:
    """A launch of `kernel`; `sizes` begin with the heads and the length that are cut into tiles."""
    heads, length = sizes[:2]
    name = kernel.kernel.__name__.removesuffix("_kernel")
    tiles = cdiv(length, 2 * BM)
    total = tiles * heads * problem.query[0]
    dim = problem.query[3]
    shape = {"GROUP": problem.group, "D": dim, "BM": BM, "BN": BN, "STAGES": stages(name, dim)}
    lengths = (problem.query[1], problem.query[2], problem.key[2], min(problem.pattern.window, problem.key[2]))
    numbers = (*sizes[2:], total, tiles, *lengths, *(() if name == "key" else (problem.sinks,)), *scales)
    programs = min(total, multiprocessors(problem.device))
    return Step(kernel, programs, (), numbers, Constants(OPTIONS, **shape, SEGMENTS=problem.segments, **flags))


class Forward:
    """The forward pass of the local band with the fusion; takes the tensors that `band_forward_kernel` takes."""

    def __init__(self, problem: Problem) -> None:
        flags = {"FUSE": problem.both, "MASS": problem.both and problem.mass}
        flags["GATED"] = problem.both and problem.gate is not None
        _, heads, queries, _ = problem.query
        scales = (problem.scale * LOG2E,)
        self.step = _step(FORWARD, problem, (heads, queries, *problem.gate_strides), scales, **flags)

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Query, key, value, starts, –, gate, skip output, its log-sum-exp, –, –, output, log-sum-exp."""
        query, key, value, starts, _, gate, skip_out, skip_lse, _, _, out, lse = tensors
        tiles = (_tile(query, 2 * BM), _tile(key, BN), _tile(value, BN), _tile(skip_out, 2 * BM), _tile(out, BM))
        self.step((*tiles, starts, gate, skip_lse, lse))


class Query:
    """The gradient of the queries, and the row terms; takes the tensors that `band_backward_query_kernel` takes."""

    def __init__(self, problem: Problem, lse: bool, skip_lse: bool) -> None:
        batch, heads, queries, _ = problem.query
        flags = {"BOTH": problem.both, "MASS": problem.mass, "GATED": problem.gate is not None}
        sizes = (heads, queries, *problem.gate_strides, batch * heads * queries)
        scales = (problem.scale, problem.scale * LOG2E)
        self.step = _step(QUERY, problem, sizes, scales, **flags, LSE=lse, SKIP_LSE=skip_lse)

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Query, key, value, starts, –, output's gradient, log-sum-exp, terms, –, –, query's gradient, rows."""
        query, key, value, starts, _, grad_out, lse, terms, _, _, grad_query, *rest = tensors
        tiles = (_tile(query, 2 * BM), _tile(key, BN), _tile(value, BN), _tile(grad_out, 2 * BM), _tile(grad_query, BM))
        self.step((*tiles, starts, lse, terms, *rest))


class Key:
    """The gradients of keys and values; takes the tensors that `band_backward_key_kernel` takes."""

    def __init__(self, problem: Problem) -> None:
        groups, keys = problem.key[1:3]
        scales = (problem.scale, problem.scale * LOG2E)
        self.step = _step(KEY, problem, (groups, keys), scales, ADD=problem.both)

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Query, key, value, starts, –, –, output's gradient, log-sum-exp, terms, gradients of key and value."""
        query, key, value, starts, _, _, grad_out, lse, terms, grad_key, grad_value = tensors
        length = lse.shape[2]
        tiles = (_tile(query, BN), _tile(grad_out, BN), _tile(key, 2 * BM), _tile(value, 2 * BM))
        sums = (_tile(grad_key, BM), _tile(grad_value, BM))
        self.step((*tiles, *sums, _row(lse.view(-1, length)), _row(terms.view(-1, length)), starts))
