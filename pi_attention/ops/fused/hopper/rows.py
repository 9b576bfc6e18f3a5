"""The producer of the kernels that own query rows: forward, and the gradient of the queries."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from pi_attention.ops.fused.hopper.steps import copy_in, range_of_rows


@gluon.jit
def rows_producer(
    q_desc, grad_desc, k_desc, v_desc, skip_desc, q_s, grad_s, k_s, v_s, o_s, q_full, q_empty, o_full, o_empty,
    k_full, k_empty, v_full, v_empty, Bands, total, tiles, H, T, S, period, phase, first, last, sinks,
    GROUP: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    GRAD: gl.constexpr, FUSE: gl.constexpr, SKIP: gl.constexpr, PER_HEAD: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """Load each tile's queries, its tiles of keys and values, and last the rows of the other band's output.

    GRAD: the output's gradient beside the queries, and no rows of the other band. QUERIES: tiles of queries that there
    is room for.
    """
    slot = 0
    count = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        batch, head, residue, row0, begin, first_tile, steps, sink_tiles, of_key, shift, _, _ = range_of_rows(
            tile, Bands, tiles, H, T, S, period, phase, first, last, sinks, GROUP, BQ, BN, SKIP, PER_HEAD
        )
        place = count % QUERIES
        mbarrier.wait(q_empty.index(place), ((count // QUERIES) & 1) ^ 1)
        mbarrier.expect(q_full.index(place), (BQ * D * 4) if GRAD else (BQ * D * 2))
        copy_in(q_desc, [batch, head, residue, row0, 0], q_full.index(place), q_s.index(place))
        if GRAD:
            copy_in(grad_desc, [batch, head, residue, row0, 0], q_full.index(place), grad_s.index(place))
        for i in range(first_tile - sink_tiles, steps):
            row = gl.where(i < first_tile, (i - first_tile + sink_tiles) * BN, begin + i * BN - shift)
            s, parity = slot % STAGES, ((slot // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(s), parity)
            mbarrier.expect(k_full.index(s), BN * D * 2)
            copy_in(k_desc, [batch, head // GROUP, of_key, row, 0], k_full.index(s), k_s.index(s))
            mbarrier.wait(v_empty.index(s), parity)
            mbarrier.expect(v_full.index(s), BN * D * 2)
            copy_in(v_desc, [batch, head // GROUP, of_key, row, 0], v_full.index(s), v_s.index(s))
            slot += 1
        if not GRAD:
            mbarrier.wait(o_empty.index(0), (count & 1) ^ 1)
            if FUSE:
                mbarrier.expect(o_full.index(0), BQ * D * 2)
                copy_in(skip_desc, [batch, head, residue, row0, 0], o_full.index(0), o_s)
            else:
                mbarrier.arrive(o_full.index(0), count=1)
        count += 1
