"""Gradients of keys and values in one band."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pi_attention.ops.fused.hopper.steps import (
    HIDDEN,
    LOG2E,
    RUN_TIME,
    barriers,
    copy_in,
    copy_out,
    lags_of_head,
    rows_of_sinks,
    rows_of_tile,
)


@gluon.jit
def _range_of_keys(tile, tiles, groups, S, period, span, BK: gl.constexpr, BN: gl.constexpr, SKIP: gl.constexpr):
    """Of a tile of BK keys: batch, key head, residue, its first row, and tiles of BN queries of each head.

    Of a head, query row r counts as key row r − `first_query`, by which key j is seen by [j, j + span), as in the
    local band; `span` is that of the head with the most lags.
    """
    of_group = tile // tiles
    residue, key0, length = rows_of_tile(tile % tiles, period, S, BK, SKIP)
    steps = gl.minimum((BK + span - 2) // BN + 1, (length - key0 + BN - 1) // BN)
    return of_group // groups, of_group % groups, residue, key0, steps


@gluon.jit
def _first_query(residue, period, phase, first):
    """The residue of the queries that see keys of a residue, and the row of the first one that sees key row 0."""
    of_query = residue + phase
    beyond = of_query >= period
    return gl.where(beyond, of_query - period, of_query), gl.where(beyond, first + 1, first)


@gluon.jit
def _lags(Bands, head, phase, first, last, PER_HEAD: gl.constexpr):
    """How many lags a head's band has."""
    _, first, last = lags_of_head(Bands, head, phase, first, last, PER_HEAD)
    return last - first


@gluon.jit
def _producer(
    q_desc, grad_desc, k_desc, v_desc, grad_k_desc, grad_v_desc, lse_desc, terms_desc,
    q_s, grad_s, k_s, v_s, grad_k_s, grad_v_s, lse_s, weight_s, shift_s,
    k_full, k_empty, sum_full, sum_empty, full, empty, Bands, total, tiles, H, T, S, period, phase, first, last, span,
    GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr,
    SKIP: gl.constexpr, PER_HEAD: gl.constexpr,
):  # fmt: skip
    """Load each tile's keys and values, its tiles of queries with their row terms, and last the sums so far."""
    slot = 0
    count = 0
    vectors = total // tiles * GROUP
    if SKIP:
        vectors *= period
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        batch, group, residue, key0, steps = _range_of_keys(tile, tiles, H // GROUP, S, period, span, 2 * BM, BN, SKIP)
        mbarrier.wait(k_empty.index(0), (count & 1) ^ 1)
        mbarrier.expect(k_full.index(0), 2 * BM * D * 4)
        copy_in(k_desc, [batch, group, residue, key0, 0], k_full.index(0), k_s)
        copy_in(v_desc, [batch, group, residue, key0, 0], k_full.index(0), v_s)
        for i in range(steps * GROUP):
            s = slot % STAGES
            head = group * GROUP + i // steps
            at = key0 + i % steps * BN - (S - T)
            of_query, row, vector = 0, at, batch * H + head
            if SKIP:
                phase, first, _ = lags_of_head(Bands, head, phase, first, last, PER_HEAD)
                of_query, first_query = _first_query(residue, period, phase, first)
                row += first_query
                vector = vector * period + residue
            mbarrier.wait(empty.index(s), ((slot // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(s), BN * D * 4 + BN * 12)
            copy_in(q_desc, [batch, head, of_query, row, 0], full.index(s), q_s.index(s))
            copy_in(lse_desc, [vector, at], full.index(s), lse_s.index(s))
            copy_in(terms_desc, [vector, at], full.index(s), weight_s.index(s))
            copy_in(grad_desc, [batch, head, of_query, row, 0], full.index(s), grad_s.index(s))
            copy_in(terms_desc, [vectors + vector, at], full.index(s), shift_s.index(s))
            slot += 1
        mbarrier.wait(sum_empty.index(0), (count & 1) ^ 1)
        if ADD:
            mbarrier.expect(sum_full.index(0), 2 * BM * D * 4)
            for half in gl.static_range(2):
                at = [batch, group, residue, key0 + half * BM, 0]
                copy_in(grad_k_desc, at, sum_full.index(0), grad_k_s.slice(half * BM, BM, dim=3))
                copy_in(grad_v_desc, at, sum_full.index(0), grad_v_s.slice(half * BM, BM, dim=3))
        else:
            mbarrier.arrive(sum_full.index(0), count=1)
        count += 1


@gluon.jit
def _is_edge(
    of_batch, key0, position0, S, lags, hidden,
    BM: gl.constexpr, BN: gl.constexpr, SEGMENTS: gl.constexpr, SKIP: gl.constexpr,
):  # fmt: skip
    """Whether some query of a tile does not see some key of a tile of rows: then keys are compared one by one."""
    edge = (position0 < key0 + BM - 1) | (position0 + BN - 1 >= key0 + lags)
    if SKIP:
        edge = edge | (key0 < hidden)
    if SEGMENTS:
        one_from = gl.load(of_batch + gl.minimum(position0 + BN, S) - 1)
        edge = edge | (one_from < 0) | (one_from > key0)
    return edge


@gluon.jit
def _sees(of_batch, key, position, S, lags, hidden, SEGMENTS: gl.constexpr, SKIP: gl.constexpr):
    """Which queries see which keys, [keys, queries]."""
    low = position - lags + 1
    if SEGMENTS:
        there = (position >= 0) & (position < S)
        start = gl.load(of_batch + position, mask=there, other=-1)
        low = gl.maximum(low, gl.where(start < 0, HIDDEN, start))
    seen = (key[:, None] >= low[None, :]) & (key[:, None] <= position[None, :])
    if SKIP:
        seen = seen & (key >= hidden)[:, None]
    return seen


@gluon.jit
def _consumer(
    grad_k_desc, grad_v_desc, q_s, grad_s, k_s, v_s, grad_k_s, grad_v_s, lse_s, weight_s, shift_s,
    k_full, k_empty, sum_full, sum_empty, full, empty, Starts, Bands, total, tiles, H, S, period, phase, first, last,
    span, sinks, scale, scale_log2,
    WHICH: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, SEGMENTS: gl.constexpr, ADD: gl.constexpr, SKIP: gl.constexpr, PER_HEAD: gl.constexpr,
):  # fmt: skip
    """Keys [WHICH·BM, (WHICH + 1)·BM) of every tile. A query that is absent is a row of zeros and adds nothing."""
    warps: gl.constexpr = gl.num_warps()
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], instr_shape=[16, BN, 16])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], instr_shape=[16, D, 16])
    weights: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=outputs, k_width=2)
    queries: gl.constexpr = gl.SliceLayout(0, scores)
    k = k_s.reshape([2 * BM, D]).slice(WHICH * BM, BM)
    v = v_s.reshape([2 * BM, D]).slice(WHICH * BM, BM)
    grad_k = grad_k_s.reshape([2 * BM, D]).slice(WHICH * BM, BM)
    grad_v = grad_v_s.reshape([2 * BM, D]).slice(WHICH * BM, BM)
    zero = gl.zeros([BM, BN], gl.float32, scores)
    slot = 0
    count = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        batch, group, residue, tile0, steps = _range_of_keys(tile, tiles, H // GROUP, S, period, span, 2 * BM, BN, SKIP)
        key0 = tile0 + WHICH * BM
        hidden = 0
        if SKIP:
            hidden = rows_of_sinks(sinks, residue, period)
        key = key0 + gl.arange(0, BM, gl.SliceLayout(1, scores))
        dk = gl.zeros([BM, D], gl.float32, outputs)
        dv = gl.zeros([BM, D], gl.float32, outputs)
        begin = WHICH * (BM // BN)
        end = begin + (BM + span - 2) // BN + 1
        of_batch = Starts + batch.to(gl.int64) * S
        lags = span
        if PER_HEAD:
            lags = _lags(Bands, group * GROUP, phase, first, last, PER_HEAD)
        mbarrier.wait(k_full.index(0), count & 1)
        for i in range(GROUP * steps):
            s = slot % STAGES
            step = i % steps
            mbarrier.wait(full.index(s), (slot // STAGES) & 1)
            if (step >= begin) & (step < end):
                q = q_s.index(s).reshape([BN, D])
                d_out = grad_s.index(s).reshape([BN, D])
                score = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
                d_weight = warpgroup_mma(v, d_out.permute((1, 0)), zero, use_acc=False, is_async=True)
                position0 = tile0 + step * BN
                if PER_HEAD and GROUP > 1:
                    lags = _lags(Bands, group * GROUP + i // steps, phase, first, last, PER_HEAD)
                edge = _is_edge(of_batch, key0, position0, S, lags, hidden, BM, BN, SEGMENTS, SKIP)
                score = warpgroup_mma_wait(1, deps=[score])
                lse = lse_s.index(s).reshape([BN]).load(queries)
                p = gl.exp2(score * scale_log2 - (lse * LOG2E)[None, :])
                if edge:
                    position = position0 + gl.arange(0, BN, queries)
                    p = gl.where(_sees(of_batch, key, position, S, lags, hidden, SEGMENTS, SKIP), p, 0.0)
                weight = weight_s.index(s).reshape([BN]).load(queries)
                weighted = gl.convert_layout((p * weight[None, :]).to(k_s.dtype), weights)
                d_weight = warpgroup_mma_wait(0, deps=[d_weight])
                dv = warpgroup_mma(weighted, d_out, dv, is_async=True)
                shift = shift_s.index(s).reshape([BN]).load(queries)
                d_score = p * (weight[None, :] * d_weight - shift[None, :])
                d_score = gl.convert_layout(d_score.to(k_s.dtype), weights)
                dk = warpgroup_mma(d_score, q, dk, is_async=True)
                dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
            mbarrier.arrive(empty.index(s), count=1)
            slot += 1
        mbarrier.arrive(k_empty.index(0), count=1)
        mbarrier.wait(sum_full.index(0), count & 1)
        dk *= scale
        if ADD:
            dv += grad_v.load(outputs).to(gl.float32)
            dk += grad_k.load(outputs).to(gl.float32)
        grad_v.store(dv.to(k_s.dtype))
        grad_k.store(dk.to(k_s.dtype))
        fence_async_shared()
        copy_out(grad_v_desc, [batch, group, residue, key0, 0], grad_v_s.slice(WHICH * BM, BM, dim=3))
        copy_out(grad_k_desc, [batch, group, residue, key0, 0], grad_k_s.slice(WHICH * BM, BM, dim=3))
        tma.store_wait(0)
        mbarrier.arrive(sum_empty.index(0), count=1)
        count += 1


@gluon.jit(do_not_specialize=RUN_TIME)
def key_kernel(
    q_desc, grad_desc, k_desc, v_desc, grad_k_desc, grad_v_desc, lse_desc, terms_desc, Starts, Bands,
    total, tiles, H, T, S, period, phase, first, last, span, sinks, scale, scale_log2,
    GROUP: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    SEGMENTS: gl.constexpr, SKIP: gl.constexpr, PER_HEAD: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """GradK and GradV [B, G, S, D], added to what is there with ADD: `total` tiles of 2·BM keys, `tiles` a key head.

    The descriptors count as those of `forward_kernel`. SKIP: the row vectors are those of the first query that sees a
    key, and lie residue by residue of the keys: a tile of them must begin at a multiple of 16 bytes.
    """
    q_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, 1, BN, D], q_desc.layout)
    grad_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, 1, BN, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [1, 1, 1, 2 * BM, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [1, 1, 1, 2 * BM, D], k_desc.layout)
    grad_k_s = gl.allocate_shared_memory(q_desc.dtype, [1, 1, 1, 2 * BM, D], k_desc.layout)
    grad_v_s = gl.allocate_shared_memory(q_desc.dtype, [1, 1, 1, 2 * BM, D], k_desc.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BN], lse_desc.layout)
    weight_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BN], lse_desc.layout)
    shift_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BN], lse_desc.layout)
    k_full, k_empty, sum_full, sum_empty = barriers(1, 1), barriers(1, 2), barriers(1, 1), barriers(1, 2)
    full, empty = barriers(STAGES, 1), barriers(STAGES, 2)
    gl.warp_specialize([
        (_consumer, (
            grad_k_desc, grad_v_desc, q_s, grad_s, k_s, v_s, grad_k_s, grad_v_s, lse_s, weight_s,
            shift_s, k_full, k_empty, sum_full, sum_empty, full, empty, Starts, Bands, total, tiles, H, S,
            period, phase, first, last, span, sinks, scale, scale_log2,
            0, GROUP, BM, BN, D, STAGES, SEGMENTS, ADD, SKIP, PER_HEAD,
        )),
        (_consumer, (
            grad_k_desc, grad_v_desc, q_s, grad_s, k_s, v_s, grad_k_s, grad_v_s, lse_s, weight_s,
            shift_s, k_full, k_empty, sum_full, sum_empty, full, empty, Starts, Bands, total, tiles, H, S,
            period, phase, first, last, span, sinks, scale, scale_log2,
            1, GROUP, BM, BN, D, STAGES, SEGMENTS, ADD, SKIP, PER_HEAD,
        )),
        (_producer, (
            q_desc, grad_desc, k_desc, v_desc, grad_k_desc, grad_v_desc, lse_desc, terms_desc, q_s,
            grad_s, k_s, v_s, grad_k_s, grad_v_s, lse_s, weight_s, shift_s, k_full, k_empty, sum_full,
            sum_empty, full, empty, Bands, total, tiles, H, T, S, period, phase, first, last, span,
            GROUP, BM, BN, D, STAGES, ADD, SKIP, PER_HEAD,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
