"""Forward kernel of one band; the local one has its sinks, and the fusion gate in its epilogue."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pi_attention.ops.fused.hopper.rows import rows_producer
from pi_attention.ops.fused.hopper.steps import (
    RUN_TIME,
    barriers,
    copy_out,
    end_of_softmax,
    gate_logits,
    gate_weight,
    is_edge,
    lowest_keys,
    online_softmax,
    range_of_rows,
    seen_keys,
    tiles_of_half,
)


@gluon.jit
def _masked(
    score, key0, position, position0, low, one_from, of_sinks, sinks, span,
    BM: gl.constexpr, BN: gl.constexpr, scores: gl.constexpr,
):  # fmt: skip
    """The scores of a tile, −inf where a query does not see a key."""
    if is_edge(key0, position0, one_from, of_sinks, span, BM, BN):
        key = key0 + gl.arange(0, BN, gl.SliceLayout(0, scores))
        score = gl.where(seen_keys(key, position, low, of_sinks, sinks, span), score, float("-inf"))
    return score


@gluon.jit
def _consumer(
    out_desc, q_s, k_s, v_s, o_s, q_full, q_empty, o_full, o_empty, k_full, k_empty, v_full, v_empty,
    Starts, Bands, Gate, SkipLse, Lse, sg_b, sg_h, sg_t, total, tiles, H, T, S, period, phase, first, last, sinks,
    scale_log2,
    WHICH: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    SEGMENTS: gl.constexpr, SKIP: gl.constexpr, PER_HEAD: gl.constexpr, FUSE: gl.constexpr, MASS: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """Rows [WHICH·BM, (WHICH + 1)·BM) of every tile; o_s holds their skip output, then their output."""
    warps: gl.constexpr = gl.num_warps()
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], instr_shape=[16, BN, 16])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], instr_shape=[16, D, 16])
    weights: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=outputs, k_width=2)
    queries: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=scores, k_width=2)
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    of_output: gl.constexpr = gl.SliceLayout(1, outputs)
    zero = gl.zeros([BM, BN], gl.float32, scores)
    slot, count = 0, 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        batch, head, residue, row0, begin, first_tile, steps, sink_tiles, _, _, span, lowest = range_of_rows(
            tile, Bands, tiles, H, T, S, period, phase, first, last, sinks, GROUP, 2 * BM, BN, SKIP, PER_HEAD
        )
        row0 += WHICH * BM
        of_tile = row0 + gl.arange(0, BM, rows)
        token = residue + of_tile * period if SKIP else of_tile
        present = token < T
        position0, position = row0 + (S - T), of_tile + (S - T)
        row = (batch * H + head).to(gl.int64) * T + token
        low, one_from = lowest_keys(Starts, batch, position, position0, present, S, span, lowest, BM, SEGMENTS)
        lse_skip = gl.zeros([BM], gl.float32, rows)
        logit = lse_skip
        if FUSE:  # loaded here, so that it is there at the end
            lse_skip = gl.load(SkipLse + row, mask=present, other=float("-inf"))
            logit = gate_logits(Gate, sg_b, sg_h, sg_t, batch, head, token, present, GATED)
        m = gl.full([BM], float("-inf"), gl.float32, rows)
        l = gl.zeros([BM], gl.float32, rows)
        acc = gl.zeros([BM, D], gl.float32, outputs)
        mbarrier.wait(q_full.index(0), count & 1)
        q = q_s.index(0).reshape([2 * BM, D]).slice(WHICH * BM, BM).load(queries)
        mbarrier.arrive(q_empty.index(0), count=1)
        own, end = tiles_of_half(first_tile, span, WHICH, BM, BN)
        for i in range(first_tile - sink_tiles, steps):
            s, parity = slot % STAGES, (slot // STAGES) & 1
            of_sinks = i < first_tile
            mbarrier.wait(k_full.index(s), parity)
            if of_sinks | ((i >= own) & (i < end)):
                key0 = gl.where(of_sinks, (i - first_tile + sink_tiles) * BN, begin + i * BN)
                k = k_s.index(s).reshape([BN, D])
                score = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
                score = warpgroup_mma_wait(0, deps=[score])
                mbarrier.arrive(k_empty.index(s), count=1)
                score = _masked(score, key0, position, position0, low, one_from, of_sinks, sinks, span, BM, BN, scores)
                p, past, m, l = online_softmax(score, m, l, scale_log2)
                acc = acc * gl.convert_layout(past, of_output)[:, None]
                p = gl.convert_layout(p.to(k_s.dtype), weights)
                mbarrier.wait(v_full.index(s), parity)
                acc = warpgroup_mma(p, v_s.index(s).reshape([BN, D]), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
            else:
                mbarrier.arrive(k_empty.index(s), count=1)
                mbarrier.wait(v_full.index(s), parity)
            mbarrier.arrive(v_empty.index(s), count=1)
            slot += 1
        l, lse = end_of_softmax(m, l)
        gl.store(Lse + row, lse, mask=present)
        g = gl.full_like(l, 1.0)
        if FUSE:
            g = gate_weight(lse, lse_skip, logit, MASS)
        mbarrier.wait(o_full.index(0), count & 1)
        own_s = o_s.reshape([2 * BM, D]).slice(WHICH * BM, BM)
        out = acc * gl.convert_layout(g / l, of_output)[:, None]
        if FUSE:
            out += gl.convert_layout(1.0 - g, of_output)[:, None] * own_s.load(outputs).to(gl.float32)
        own_s.store(out.to(k_s.dtype))
        fence_async_shared()
        copy_out(out_desc, [batch, head, residue, row0, 0], o_s.slice(WHICH * BM, BM, dim=3))
        tma.store_wait(0)
        mbarrier.arrive(o_empty.index(0), count=1)
        count += 1


@gluon.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    q_desc, k_desc, v_desc, skip_desc, out_desc, Starts, Bands, Gate, SkipLse, Lse,
    sg_b, sg_h, sg_t, total, tiles, H, T, S, period, phase, first, last, sinks, scale_log2,
    GROUP: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    SEGMENTS: gl.constexpr, SKIP: gl.constexpr, PER_HEAD: gl.constexpr, FUSE: gl.constexpr, MASS: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """Out [B, H, T, D] and Lse [B, H, T]: `total` tiles of 2·BM query rows of one residue, `tiles` of them a head.

    The descriptors count [batch, head, residue, row, feature]; without SKIP there is one residue, and all have as many
    rows. SKIP: no segments, as many queries as keys, no gate; the first `sinks` keys are hidden.
    With FUSE, Out is g·(this band) + (1 − g)·(skip band), g from the gate logits and the two log-sum-exps.
    """
    q_s = gl.allocate_shared_memory(q_desc.dtype, [1, 1, 1, 1, 2 * BM, D], q_desc.layout)
    o_s = gl.allocate_shared_memory(q_desc.dtype, [1, 1, 1, 2 * BM, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, 1, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, 1, BN, D], k_desc.layout)
    q_full, q_empty, o_full, o_empty = barriers(1, 1), barriers(1, 2), barriers(1, 1), barriers(1, 2)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    gl.warp_specialize([
        (_consumer, (
            out_desc, q_s, k_s, v_s, o_s, q_full, q_empty, o_full, o_empty, k_full, k_empty, v_full,
            v_empty, Starts, Bands, Gate, SkipLse, Lse, sg_b, sg_h, sg_t, total, tiles, H, T, S, period,
            phase, first, last, sinks, scale_log2,
            0, GROUP, BM, BN, D, STAGES, SEGMENTS, SKIP, PER_HEAD, FUSE, MASS, GATED,
        )),
        (_consumer, (
            out_desc, q_s, k_s, v_s, o_s, q_full, q_empty, o_full, o_empty, k_full, k_empty, v_full,
            v_empty, Starts, Bands, Gate, SkipLse, Lse, sg_b, sg_h, sg_t, total, tiles, H, T, S, period,
            phase, first, last, sinks, scale_log2,
            1, GROUP, BM, BN, D, STAGES, SEGMENTS, SKIP, PER_HEAD, FUSE, MASS, GATED,
        )),
        (rows_producer, (
            q_desc, q_desc, k_desc, v_desc, skip_desc, q_s, q_s, k_s, v_s, o_s, q_full, q_empty, o_full,
            o_empty, k_full, k_empty, v_full, v_empty, Bands, total, tiles, H, T, S, period, phase, first,
            last, sinks, GROUP, 2 * BM, BN, D, STAGES, False, FUSE, SKIP, PER_HEAD, 1,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
