"""Which calls the Hopper kernels serve. Gluon is experimental: only a call that they serve imports it."""

from __future__ import annotations

import triton

from pi_attention.ops.fused.tiling import INTERPRETED, Problem, is_hopper, row_lags

MEASURED = triton.__version__.startswith("3.6.")
"""Whether this version of Gluon was tried on a GPU. Its names change from version to version."""

LEAST = 1 << 25
"""Elements of the query from which they serve: below, the kernels are short and the host's descriptors cost more."""

LEAST_OF_SKIPS = 64, 1024
"""Lags and rows of a residue from which they serve the skip band: smaller ones leave most of a tile unused."""

HEAD_DIMS = {"forward": (128,), "query": (128,), "key": (64, 128)}
"""Head dims at which they are the faster ones, measured on an H200."""


def serves(kernel: str, problem: Problem, skip: bool, grad_strides: tuple[int, ...] = ()) -> bool:
    """Whether the Hopper kernel "forward", "query" or "key" serves the local band of a call, or the skip band.

    The tensor memory accelerator wants rows of neighbouring elements, and strides that are multiples of 16 bytes.
    """
    pattern, (batch, heads, queries, dim) = problem.pattern, problem.query
    if problem.softcap or (problem.sink_logit and kernel != "key"):  # the key kernel finds it in the row terms
        return False
    if not MEASURED or INTERPRETED or batch * heads * queries * dim < LEAST or dim not in HEAD_DIMS[kernel]:
        return False
    if not is_hopper(problem.device) or problem.dtype.itemsize != 2 or not problem.aligned:
        return False
    if pattern.ring or not pattern.causal or (problem.segments and problem.sinks and kernel != "key"):
        return False
    if kernel == "key" and (queries % 4 or problem.key[2] % 4 or problem.key[2] > queries + queries // 8):
        return False  # row vectors are loaded by tiles, too, of 16 bytes; and it walks over queries that are not there
    if skip and not _residues_fill_tiles(problem):
        return False
    strides = problem.strides + grad_strides
    return all(s > 0 and (s == 1 if i % 4 == 3 else s % 8 == 0) for i, s in enumerate(strides))


def _residues_fill_tiles(problem: Problem) -> bool:
    """Whether the kernels serve the skip band where they serve the local one.

    Its tiles are rows of one residue: heads have one period, of which four divide the length, since a row vector of a
    residue has whole 16 bytes. Sums of the queries' gradient begin with what is there, divided by the scale.
    """
    pattern, length = problem.pattern, problem.key[2]
    period, _, first, last = row_lags(pattern, True, 0, length)[:4]
    lags, rows = LEAST_OF_SKIPS
    if len(set(pattern.periods)) > 1 or length % (4 * period) or problem.query[2] != length:
        return False
    if last - first < lags or length // period < rows or problem.segments or problem.sink_logit:
        return False
    return abs(problem.scale) > 2**-20
