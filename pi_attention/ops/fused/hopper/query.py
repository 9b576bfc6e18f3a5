"""Gradient of the queries in one band; the local one makes the terms of every row and the gradient of the gate."""

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
    LOG2E,
    RUN_TIME,
    barriers,
    copy_out,
    gate_logits,
    gate_weight,
    is_edge,
    lowest_keys,
    place_of_head,
    place_of_tile,
    range_of_rows,
    rows_of_tile,
    seen_keys,
    tiles_of_half,
)


@gluon.jit
def _row_terms(
    grad, out, skip_out, lse, lse_skip, logit, GradLse, GradSkipLse, Terms, GradGate, index, present, all_rows,
    BOTH: gl.constexpr, MASS: gl.constexpr, GATED: gl.constexpr, LSE: gl.constexpr, SKIP_LSE: gl.constexpr,
):  # fmt: skip
    """w and c of the local band; those of both are stored, as `kernels.backward.row_terms` says."""
    grad = grad.to(gl.float32)
    delta = gl.convert_layout(gl.sum(grad * out.to(gl.float32), 1), lse.type.layout)
    delta_skip = gl.convert_layout(gl.sum(grad * skip_out.to(gl.float32), 1), lse.type.layout)
    weight = gl.full_like(delta, 1.0)
    shift = delta
    if LSE:
        shift -= gl.where(lse == float("-inf"), 0.0, gl.load(GradLse + index, mask=present, other=0.0))
    if BOTH:
        no_skip = lse_skip == float("-inf")
        weight = gate_weight(lse, lse_skip, logit, MASS)
        grad_gate = gl.where(no_skip, 0.0, (1.0 - weight) * (delta - delta_skip))
        skip_shift = (1.0 - weight) * delta_skip
        shift -= skip_shift
        if MASS:
            shift -= grad_gate
            skip_shift += grad_gate
        if SKIP_LSE:
            skip_shift -= gl.where(no_skip, 0.0, gl.load(GradSkipLse + index, mask=present, other=0.0))
        gl.store(Terms + 2 * all_rows + index, 1.0 - weight, mask=present)
        gl.store(Terms + 3 * all_rows + index, skip_shift, mask=present)
        if GATED:
            gl.store(GradGate + index, grad_gate.to(GradGate.dtype.element_ty), mask=present)
    gl.store(Terms + index, weight, mask=present)
    gl.store(Terms + all_rows + index, shift, mask=present)
    return weight, shift


@gluon.jit
def _outputs_of(
    tile, Out, SkipOut, Lse, SkipLse, Gate, sg_b, sg_h, sg_t, total, tiles, H, T,
    WHICH: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, D: gl.constexpr, wide: gl.constexpr, rows: gl.constexpr,
    BY_TOKEN: gl.constexpr, BOTH: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Of the rows of a tile: outputs of both bands, log-sum-exps, gate logits. Beyond the last tile, those of the last.

    They are loaded one tile ahead.
    """
    batch, head, number = place_of_tile(gl.minimum(tile, total - 1), tiles, H, GROUP)
    of_head = (batch * H + head).to(gl.int64) * T
    token0 = number * 2 * BM + WHICH * BM
    line = token0 + gl.arange(0, BM, gl.SliceLayout(1, wide))
    feature = gl.arange(0, D, gl.SliceLayout(0, wide))[None, :]
    begin, step = place_of_head(batch, head, H, T, D, BY_TOKEN)
    offset = begin + line.to(gl.int64)[:, None] * step + feature
    out = gl.load(Out + offset, mask=(line < T)[:, None], other=0.0)
    token = token0 + gl.arange(0, BM, rows)
    present = token < T
    lse = gl.load(Lse + of_head + token, mask=present, other=0.0)
    skip_out, lse_skip, logit = out, lse, lse
    if BOTH:
        offset = (of_head + line)[:, None] * D + feature
        skip_out = gl.load(SkipOut + offset, mask=(line < T)[:, None], other=0.0)
        lse_skip = gl.load(SkipLse + of_head + token, mask=present, other=0.0)
        logit = gate_logits(Gate, sg_b, sg_h, sg_t, batch, head, token, present, GATED)
    return out, skip_out, lse, lse_skip, logit


@gluon.jit
def _gradients_of(
    tile, GradQ, Lse, Terms, all_rows, total, tiles, H, T, period,
    WHICH: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, D: gl.constexpr, outputs: gl.constexpr,
    rows: gl.constexpr,
):  # fmt: skip
    """Of the rows of a tile of the skip band: the local band's gradient, log-sum-exps, w and c; see `_outputs_of`."""
    batch, head, number = place_of_tile(gl.minimum(tile, total - 1), tiles, H, GROUP)
    of_head = (batch * H + head).to(gl.int64) * T
    residue, row0, _ = rows_of_tile(number, period, T, 2 * BM, True)
    row0 += WHICH * BM
    line = residue + (row0 + gl.arange(0, BM, gl.SliceLayout(1, outputs))) * period
    offset = (of_head + line)[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, outputs))[None, :]
    earlier = gl.load(GradQ + offset, mask=(line < T)[:, None], other=0.0)
    token = residue + (row0 + gl.arange(0, BM, rows)) * period
    present = token < T
    index = of_head + token
    lse = gl.load(Lse + index, mask=present, other=0.0)
    weight = gl.load(Terms + 2 * all_rows + index, mask=present, other=0.0)
    return earlier, lse, weight, gl.load(Terms + 3 * all_rows + index, mask=present, other=0.0)


@gluon.jit
def _add_tile(
    dq, q, d_out, k, v, v_read, base, weight, shift, low, one_from, key0, position, position0, of_sinks, sinks, span,
    scale_log2, BM: gl.constexpr, BN: gl.constexpr, scores: gl.constexpr, weights: gl.constexpr,
):  # fmt: skip
    """The gradient of the queries with one more tile of keys; arrives at `v_read` when the values have been read."""
    zero = gl.zeros([BM, BN], gl.float32, scores)
    score = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    d_weight = warpgroup_mma(d_out, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(1, deps=[score])
    p = gl.exp2(score * scale_log2 - base[:, None])
    if is_edge(key0, position0, one_from, of_sinks, span, BM, BN):
        key = key0 + gl.arange(0, BN, gl.SliceLayout(0, scores))
        p = gl.where(seen_keys(key, position, low, of_sinks, sinks, span), p, 0.0)
    d_weight = warpgroup_mma_wait(0, deps=[d_weight])
    mbarrier.arrive(v_read, count=1)
    d_score = p * (weight[:, None] * d_weight - shift[:, None])
    d_score = gl.convert_layout(d_score.to(k.dtype), weights)
    dq = warpgroup_mma(d_score, k, dq, is_async=True)
    return warpgroup_mma_wait(0, deps=[dq])


@gluon.jit
def _consumer(
    grad_q_desc, q_s, grad_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, Starts, Bands, Lse, Terms,
    GradQ, Out, SkipOut, SkipLse, GradLse, GradSkipLse, Gate, GradGate, sg_b, sg_h, sg_t, all_rows,
    total, tiles, H, T, S, period, phase, first, last, sinks, scale, scale_log2,
    WHICH: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    QUERIES: gl.constexpr, BY_TOKEN: gl.constexpr, SEGMENTS: gl.constexpr, SKIP: gl.constexpr, PER_HEAD: gl.constexpr,
    BOTH: gl.constexpr, MASS: gl.constexpr, GATED: gl.constexpr, LSE: gl.constexpr, SKIP_LSE: gl.constexpr,
):  # fmt: skip
    """Rows [WHICH·BM, (WHICH + 1)·BM) of every tile; the queries' place takes their gradient at the end."""
    warps: gl.constexpr = gl.num_warps()
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], instr_shape=[16, BN, 16])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], instr_shape=[16, D, 16])
    weights: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=outputs, k_width=2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [warps, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    slot, count = 0, 0
    if SKIP:
        earlier, lse, weight, shift = _gradients_of(
            gl.program_id(0), GradQ, Lse, Terms, all_rows, total, tiles, H, T, period,
            WHICH, GROUP, BM, D, outputs, rows,
        )  # fmt: skip
    else:
        out, skip_out, lse, lse_skip, logit = _outputs_of(
            gl.program_id(0), Out, SkipOut, Lse, SkipLse, Gate, sg_b, sg_h, sg_t, total, tiles, H, T,
            WHICH, GROUP, BM, D, wide, rows, BY_TOKEN, BOTH, GATED,
        )  # fmt: skip
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        batch, head, residue, row0, begin, first_tile, steps, sink_tiles, _, _, span, lowest = range_of_rows(
            tile, Bands, tiles, H, T, S, period, phase, first, last, sinks, GROUP, 2 * BM, BN, SKIP, PER_HEAD
        )
        row0 += WHICH * BM
        row = row0 + gl.arange(0, BM, rows)
        position0, position = row0 + (S - T), row + (S - T)
        low, one_from = lowest_keys(Starts, batch, position, position0, row < T, S, span, lowest, BM, SEGMENTS)
        place = count % QUERIES
        mbarrier.wait(q_full.index(place), (count // QUERIES) & 1)
        q = q_s.index(place).reshape([2 * BM, D]).slice(WHICH * BM, BM)
        d_out = grad_s.index(place).reshape([2 * BM, D]).slice(WHICH * BM, BM)
        if SKIP:
            dq = earlier.to(gl.float32) / scale
        else:
            weight, shift = _row_terms(
                d_out.load(wide), out, skip_out, lse, lse_skip, logit, GradLse, GradSkipLse, Terms, GradGate,
                (batch * H + head).to(gl.int64) * T + row, row < T, all_rows, BOTH, MASS, GATED, LSE, SKIP_LSE,
            )  # fmt: skip
            dq = gl.zeros([BM, D], gl.float32, outputs)
        base = gl.where(lse == float("-inf"), 0.0, lse) * LOG2E
        own, end = tiles_of_half(first_tile, span, WHICH, BM, BN)
        for i in range(first_tile - sink_tiles, steps):
            s, parity = slot % STAGES, (slot // STAGES) & 1
            of_sinks = i < first_tile
            mbarrier.wait(k_full.index(s), parity)
            mbarrier.wait(v_full.index(s), parity)
            if of_sinks | ((i >= own) & (i < end)):
                key0 = gl.where(of_sinks, (i - first_tile + sink_tiles) * BN, begin + i * BN)
                dq = _add_tile(
                    dq, q, d_out, k_s.index(s).reshape([BN, D]), v_s.index(s).reshape([BN, D]), v_empty.index(s),
                    base, weight, shift, low, one_from, key0, position, position0, of_sinks, sinks, span, scale_log2,
                    BM, BN, scores, weights,
                )  # fmt: skip
            else:
                mbarrier.arrive(v_empty.index(s), count=1)
            mbarrier.arrive(k_empty.index(s), count=1)
            slot += 1
        if SKIP:
            earlier, lse, weight, shift = _gradients_of(
                tile + gl.num_programs(0), GradQ, Lse, Terms, all_rows, total, tiles, H, T, period,
                WHICH, GROUP, BM, D, outputs, rows,
            )  # fmt: skip
        else:
            out, skip_out, lse, lse_skip, logit = _outputs_of(
                tile + gl.num_programs(0), Out, SkipOut, Lse, SkipLse, Gate, sg_b, sg_h, sg_t, total, tiles, H, T,
                WHICH, GROUP, BM, D, wide, rows, BY_TOKEN, BOTH, GATED,
            )  # fmt: skip
        q.store((dq * scale).to(k_s.dtype))
        fence_async_shared()
        copy_out(grad_q_desc, [batch, head, residue, row0, 0], q_s.index(place).slice(WHICH * BM, BM, dim=3))
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(place), count=1)
        count += 1


@gluon.jit(do_not_specialize=RUN_TIME)
def query_kernel(
    q_desc, k_desc, v_desc, grad_desc, grad_q_desc, Starts, Bands, Lse, Terms, GradQ,
    Out, SkipOut, SkipLse, GradLse, GradSkipLse, Gate, GradGate,
    sg_b, sg_h, sg_t, rows, total, tiles, H, T, S, period, phase, first, last, sinks, scale, scale_log2,
    GROUP: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    SEGMENTS: gl.constexpr, SKIP: gl.constexpr, PER_HEAD: gl.constexpr, QUERIES: gl.constexpr, BY_TOKEN: gl.constexpr,
    BOTH: gl.constexpr, MASS: gl.constexpr, GATED: gl.constexpr, LSE: gl.constexpr, SKIP_LSE: gl.constexpr,
):  # fmt: skip
    """GradQ [B, H, T, D] and Terms [4, B, H, T]: `total` tiles of 2·BM query rows of a residue, `tiles` of them a head.

    The descriptors count as those of `forward_kernel`. SKIP: Terms are there, and GradQ is added to what is there.
    BY_TOKEN: Out is [B, T, H, D].
    QUERIES: tiles of queries that there is room for; of two, the next one comes while one is computed.
    """
    all_rows = rows.to(gl.int64)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [QUERIES, 1, 1, 1, 2 * BM, D], q_desc.layout)
    grad_s = gl.allocate_shared_memory(q_desc.dtype, [QUERIES, 1, 1, 1, 2 * BM, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, 1, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, 1, BN, D], k_desc.layout)
    q_full, q_empty = barriers(QUERIES, 1), barriers(QUERIES, 2)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    gl.warp_specialize([
        (_consumer, (
            grad_q_desc, q_s, grad_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
            Starts, Bands, Lse, Terms, GradQ, Out, SkipOut, SkipLse, GradLse, GradSkipLse, Gate, GradGate,
            sg_b, sg_h, sg_t, all_rows, total, tiles, H, T, S, period, phase, first, last, sinks, scale, scale_log2,
            0, GROUP, BM, BN, D, STAGES, QUERIES, BY_TOKEN, SEGMENTS, SKIP, PER_HEAD, BOTH, MASS, GATED, LSE, SKIP_LSE,
        )),
        (_consumer, (
            grad_q_desc, q_s, grad_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
            Starts, Bands, Lse, Terms, GradQ, Out, SkipOut, SkipLse, GradLse, GradSkipLse, Gate, GradGate,
            sg_b, sg_h, sg_t, all_rows, total, tiles, H, T, S, period, phase, first, last, sinks, scale, scale_log2,
            1, GROUP, BM, BN, D, STAGES, QUERIES, BY_TOKEN, SEGMENTS, SKIP, PER_HEAD, BOTH, MASS, GATED, LSE, SKIP_LSE,
        )),
        (rows_producer, (
            q_desc, grad_desc, k_desc, v_desc, q_desc, q_s, grad_s, k_s, v_s, q_s, q_full, q_empty,
            q_full, q_empty, k_full, k_empty, v_full, v_empty, Bands, total, tiles, H, T, S, period, phase,
            first, last, sinks, GROUP, 2 * BM, BN, D, STAGES, True, False, SKIP, PER_HEAD, QUERIES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
