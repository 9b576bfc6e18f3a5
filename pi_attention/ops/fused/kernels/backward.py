"""Backward kernels of one band. No atomics: dQ by query tile, dK and dV by key tile.

With the weights P of the band, a row weight w and a row shift c (see `row_terms`):

    dS = P·(w·(dO·vⱼ) − c)      dQ = dS·K      dK = dSᵀ·Q      dV = (w·P)ᵀ·dO

With a soft cap, dS is that of the capped score y, times 1 − (y / cap)².
"""

import triton
import triton.language as tl

from pi_attention.ops.fused.kernels.steps import (
    ABSENT,
    BY_START,
    BY_TAG,
    LOG2E,
    RUN_TIME,
    after_starts,
    band_of_head,
    band_weights,
    first_row,
    gate_weight,
    in_one_segment,
    keep_share,
    last_row,
    load_key_tags,
    load_query_tags,
    load_rows,
    load_tile,
    next_start,
    place_of_head,
    share_of,
    soft_cap,
    store_rows,
    through_soft_cap,
    tile_of_head,
    visible,
)


@triton.jit
def row_terms(
    d_out, lse, Out, SkipOut, SkipLse, GradLse, GradSkipLse, Gate, Terms, GradGate, SinkLogit, GradSinkLogit,
    batch, head, H, T, token, present, rows, sg_t,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BY_TOKEN: tl.constexpr, BOTH: tl.constexpr,
    MASS: tl.constexpr, GATED: tl.constexpr, LSE: tl.constexpr, SKIP_LSE: tl.constexpr, SINK_LOGIT: tl.constexpr,
):  # fmt: skip
    """What the backward pass of each band needs of a query row; stored in Terms [4, B, H, T]: w and c, local and skip.

    With Δ = ⟨dO, out⟩, Δs = ⟨dO, s⟩ and β = 1 for "mass", 0 for "gate":
    da = (1 − g)(Δ − Δs), c = Δ − (1 − g)Δs − β·da − dλ and (1 − g)Δs + β·da − dμ, w = g and 1 − g.
    LSE, SKIP_LSE: whether the log-sum-exps have a gradient. SINK_LOGIT: see `terms_beside_sink`. Returns w and c of the
    local band.
    """
    of_head = (batch.to(tl.int64) * H + head) * T
    index = of_head + token
    begin, step = place_of_head(batch, head, H, T, D, BY_TOKEN)
    grad = d_out.to(tl.float32)
    delta = tl.sum(grad * load_rows(Out + begin, step, 1, token, present, D, BD).to(tl.float32), 1)
    d_lse = tl.zeros([BM], tl.float32)
    if LSE:
        d_lse = tl.load(GradLse + index, mask=present, other=0.0)
        d_lse = tl.where(lse == float("-inf"), 0.0, d_lse)
    weight = tl.full([BM], 1.0, tl.float32)
    shift = delta - d_lse
    if BOTH:
        delta_skip = tl.sum(grad * load_rows(SkipOut + of_head * D, D, 1, token, present, D, BD).to(tl.float32), 1)
        lse_skip = tl.load(SkipLse + index, mask=present, other=0.0)
        no_skip = lse_skip == float("-inf")
        d_lse_skip = tl.zeros([BM], tl.float32)
        if SKIP_LSE:
            d_lse_skip = tl.load(GradSkipLse + index, mask=present, other=0.0)
        logit = tl.zeros([BM], tl.float32)
        if GATED:
            logit += tl.load(Gate + token.to(tl.int64) * sg_t, mask=present, other=0.0).to(tl.float32)
        if SINK_LOGIT:
            weight, skip_weight, shift, skip_shift, grad_gate, grad_sink = terms_beside_sink(
                delta, delta_skip, lse, lse_skip, logit, tl.load(SinkLogit).to(tl.float32), MASS
            )
            shift -= d_lse
            skip_shift -= tl.where(no_skip, 0.0, d_lse_skip)
            tl.store(GradSinkLogit + index, grad_sink, mask=present)
        else:
            weight = gate_weight(lse, lse_skip, logit, MASS)
            skip_weight = 1.0 - weight
            grad_gate = tl.where(no_skip, 0.0, (1.0 - weight) * (delta - delta_skip))
            through_mass = grad_gate if MASS else 0.0
            shift = delta - (1.0 - weight) * delta_skip - through_mass - d_lse
            skip_shift = (1.0 - weight) * delta_skip + through_mass - tl.where(no_skip, 0.0, d_lse_skip)
        tl.store(Terms + 2 * rows + index, skip_weight, mask=present)
        tl.store(Terms + 3 * rows + index, skip_shift, mask=present)
        if GATED:
            tl.store(GradGate + index, grad_gate.to(GradGate.dtype.element_ty), mask=present)
    elif SINK_LOGIT:
        sink_logit = tl.load(SinkLogit).to(tl.float32)
        weight = keep_share(lse, sink_logit)
        shift = weight * delta - d_lse
        tl.store(GradSinkLogit + index, -share_of(sink_logit, lse, float("-inf")) * delta, mask=present)
    tl.store(Terms + index, weight, mask=present)
    tl.store(Terms + rows + index, shift, mask=present)
    return weight, shift


@triton.jit
def terms_beside_sink(delta, delta_skip, lse, lse_skip, logit, sink_logit, MASS: tl.constexpr):
    """w and c of both bands without dλ and dμ, and the gradients of gate and sink logit z of a row.

    "mass" is a softmax of three terms, λ + a, μ and z, with the values ℓ, s and 0: dλ = w(Δℓ − Δ), so c = w·Δ.
    "gate" is two softmaxes of two terms; the bands' parts of Δ are Δ − ws·Δs and ws·Δs, of which each keeps its share.
    """
    no_skip = lse_skip == float("-inf")
    weight, skip_weight = band_weights(lse, lse_skip, logit, sink_logit, MASS)
    part_skip = skip_weight * delta_skip
    part = delta - part_skip
    if MASS:
        shift, skip_shift = weight * delta, skip_weight * delta
        grad_gate = part - shift
        raised = lse + tl.where(no_skip, 0.0, logit)
        grad_sink = -share_of(sink_logit, raised, lse_skip) * delta
    else:
        shift, skip_shift = keep_share(lse, sink_logit) * part, keep_share(lse_skip, sink_logit) * part_skip
        grad_gate = delta - gate_weight(lse, lse_skip, logit, MASS) * delta - part_skip
        none = float("-inf")
        grad_sink = -share_of(sink_logit, lse, none) * part - share_of(sink_logit, lse_skip, none) * part_skip
    return weight, skip_weight, shift, skip_shift, tl.where(no_skip, 0.0, grad_gate), grad_sink


@triton.jit
def weights(score, lse, seen, scale_log2):
    """P = exp(score − log-sum-exp), 0 where hidden."""
    shift = tl.where(lse == float("-inf"), 0.0, lse) * LOG2E
    return tl.where(seen, tl.math.exp2(score * scale_log2 - shift), 0.0)


@triton.jit
def _tiles_of_query(
    q, d_out, dq, lse, weight, shift, K, V, batch, group, Starts, sk_t, sk_d, sv_t, sv_d,
    begin, last_key, row, query_tag, offset, period, S, first, last, sinks, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, RING: tl.constexpr, SEGMENTS: tl.constexpr,
    SINKS: tl.constexpr, TAGS: tl.constexpr, DESCRIBED: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries through the key rows [begin, last_key], by tiles of BN."""
    for start in tl.range(begin, last_key + 1, BN):
        key_row = start + tl.arange(0, BN)
        position = offset + key_row * period
        if RING:
            position = (position % S + S) % S
        present = key_row <= last_key
        k = load_tile(K, sk_t, sk_d, batch, group, offset + start, position, present, D, BD, BN, DESCRIBED)
        v = load_tile(V, sv_t, sv_d, batch, group, offset + start, position, present, D, BD, BN, DESCRIBED)
        key_row = tl.where(present, key_row, ABSENT)
        key_tag = key_row
        if TAGS:
            key_tag = load_key_tags(Starts, position, present, sinks, SEGMENTS, SINKS)
        seen = visible(row[:, None], key_row[None, :], query_tag[:, None], key_tag[None, :], first, last, TAGS)
        dq = _add_to_query(q, d_out, dq, lse, weight, shift, k, v, seen, scale_log2, SOFTCAP, PRECISION)
    return dq


@triton.jit
def _add_to_query(
    q, d_out, dq, lse, weight, shift, k, v, seen, scale_log2, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BD] @ [BD, BN] -> [BM, BN]
    score, factor = soft_cap(score, scale_log2, SOFTCAP)
    p = weights(score, lse[:, None], seen, factor)
    d_weight = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)  # [BM, BD] @ [BD, BN] -> [BM, BN]
    d_score = through_soft_cap(p * (weight[:, None] * d_weight - shift[:, None]), score, SOFTCAP)
    return tl.dot(d_score.to(k.dtype), k, dq, input_precision=PRECISION)  # [BM, BN] @ [BN, BD] -> [BM, BD]


@triton.jit
def _side_of_query(
    q, d_out, dq, lse, weight, shift, K, V, batch, group, Starts, sk_t, sk_d, sv_t, sv_d,
    row0, row_end, row, query_tag, origin, offset, period, S, first, last, sinks, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, RING: tl.constexpr, SEGMENTS: tl.constexpr,
    SINKS: tl.constexpr, DESCRIBED: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    begin = row0 - last + 1
    last_key = row_end - first
    if not RING:
        begin = tl.maximum(begin, first_row(offset, period))
        last_key = tl.minimum(last_key, last_row(offset, period, S))
        if SINKS and not SEGMENTS:
            begin = tl.maximum(begin, first_row(offset - sinks, period))
    alike = SEGMENTS != BY_TAG
    if SEGMENTS == BY_START:
        begin, last = after_starts(query_tag, row, begin, offset, period, first, last, sinks, SINKS)
    elif SEGMENTS and not RING:
        alike = in_one_segment(
            Starts, origin + row0 * period, origin + row_end * period,
            offset + begin * period, offset + last_key * period, sinks, SINKS,
        )  # fmt: skip
    if alike:
        dq = _tiles_of_query(
            q, d_out, dq, lse, weight, shift, K, V, batch, group, Starts, sk_t, sk_d, sv_t, sv_d,
            begin, last_key, row, query_tag, offset, period, S, first, last, sinks, scale_log2,
            D, BD, BN, RING, SEGMENTS, SINKS, False, DESCRIBED, SOFTCAP, PRECISION,
        )  # fmt: skip
    else:
        dq = _tiles_of_query(
            q, d_out, dq, lse, weight, shift, K, V, batch, group, Starts, sk_t, sk_d, sv_t, sv_d,
            begin, last_key, row, query_tag, offset, period, S, first, last, sinks, scale_log2,
            D, BD, BN, RING, SEGMENTS, SINKS, True, DESCRIBED, SOFTCAP, PRECISION,
        )  # fmt: skip
    return dq


@triton.jit
def add_to_key(
    k, v, dk, dv, q, d_out, lse, weight, shift, seen, scale_log2, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients dk and dv of a tile of keys, through one tile of queries; `seen` is [keys, queries]."""
    score = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BM, BD] @ [BD, BN] -> [BM, BN]
    score, factor = soft_cap(score, scale_log2, SOFTCAP)
    p = weights(score, lse[None, :], seen, factor)
    weighted = (p * weight[None, :]).to(d_out.dtype)
    dv = tl.dot(weighted, d_out, dv, input_precision=PRECISION)  # [BM, BN] @ [BN, BD] -> [BM, BD]
    d_weight = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)  # [BM, BD] @ [BD, BN] -> [BM, BN]
    d_score = through_soft_cap(p * (weight[None, :] * d_weight - shift[None, :]), score, SOFTCAP)
    dk = tl.dot(d_score.to(q.dtype), q, dk, input_precision=PRECISION)  # [BM, BN] @ [BN, BD] -> [BM, BD]
    return dk, dv


@triton.jit
def _tiles_of_key(
    k, v, dk, dv, Q, GradOut, Starts, Lse, Weight, Shift, sq_t, sq_d, sd_t, sd_d,
    begin, last_query, key_row, key_tag, offset, period, T, S, first, last, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, RING: tl.constexpr, SEGMENTS: tl.constexpr,
    TAGS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values through the query rows [begin, last_query], by tiles of BN."""
    for start in tl.range(begin, last_query + 1, BN):
        row = start + tl.arange(0, BN)
        position = offset + row * period
        if RING:
            position = (position % S + S) % S
        token = position - (S - T)
        present = (row <= last_query) & (token >= 0)
        q = load_rows(Q, sq_t, sq_d, token, present, D, BD)
        d_out = load_rows(GradOut, sd_t, sd_d, token, present, D, BD)
        lse = tl.load(Lse + token, mask=present, other=0.0)
        weight = tl.load(Weight + token, mask=present, other=0.0)
        shift = tl.load(Shift + token, mask=present, other=0.0)
        query_tag = row
        if TAGS:
            query_tag = load_query_tags(Starts, position, present, SEGMENTS)
        seen = visible(row[None, :], key_row[:, None], query_tag[None, :], key_tag[:, None], first, last, TAGS)
        dk, dv = add_to_key(k, v, dk, dv, q, d_out, lse, weight, shift, seen, scale_log2, SOFTCAP, PRECISION)
    return dk, dv


@triton.jit
def _side_of_key(
    k, v, dk, dv, Q, GradOut, Starts, Lse, Weight, Shift, sq_t, sq_d, sd_t, sd_d,
    row0, row_end, key_row, key_tag, origin, offset, period, T, S, first, last, sinks, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, RING: tl.constexpr, SEGMENTS: tl.constexpr,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Key row 0 is at position `origin`, query row 0 at `offset`."""
    begin = row0 + first
    last_query = row_end + last - 1
    if not RING:
        begin = tl.maximum(begin, first_row(offset - (S - T), period))
        last_query = tl.minimum(last_query, last_row(offset, period, S))
    alike = not SEGMENTS
    if SEGMENTS and not RING:
        alike = begin <= last_query
        if alike:
            alike = in_one_segment(
                Starts, offset + begin * period, offset + last_query * period,
                origin + row0 * period, origin + row_end * period, sinks, SINKS,
            )  # fmt: skip
    if alike:
        dk, dv = _tiles_of_key(
            k, v, dk, dv, Q, GradOut, Starts, Lse, Weight, Shift, sq_t, sq_d, sd_t, sd_d,
            begin, last_query, key_row, key_tag, offset, period, T, S, first, last, scale_log2,
            D, BD, BN, RING, SEGMENTS, False, SOFTCAP, PRECISION,
        )  # fmt: skip
    else:
        dk, dv = _tiles_of_key(
            k, v, dk, dv, Q, GradOut, Starts, Lse, Weight, Shift, sq_t, sq_d, sd_t, sd_d,
            begin, last_query, key_row, key_tag, offset, period, T, S, first, last, scale_log2,
            D, BD, BN, RING, SEGMENTS, True, SOFTCAP, PRECISION,
        )  # fmt: skip
    return dk, dv


@triton.jit
def _sinks_of_query(
    q, d_out, dq, lse, weight, shift, K, V, sk_t, sk_d, sv_t, sv_d, start, position, query_tag, last_position,
    S, window, sinks, scale_log2, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries through the sinks of the segment from `start` on that lie beyond the window."""
    end = tl.minimum(sinks, last_position - window - start + 1)
    for first in tl.range(0, end, BS):
        sink = start + first + tl.arange(0, BS)
        present = (sink < start + sinks) & (sink < S)
        k = load_rows(K, sk_t, sk_d, sink, present, D, BD)
        v = load_rows(V, sv_t, sv_d, sink, present, D, BD)
        seen = present[None, :] & (position[:, None] - sink[None, :] >= window) & (query_tag[:, None] == start)
        dq = _add_to_query(q, d_out, dq, lse, weight, shift, k, v, seen, scale_log2, SOFTCAP, PRECISION)
    return dq


@triton.jit(do_not_specialize=RUN_TIME)
def band_backward_query_kernel(
    Q, K, V, Starts, Bands, GradOut, Lse, Terms, SinkK, SinkV, GradQ,
    Out, SkipOut, SkipLse, GradLse, GradSkipLse, Gate, GradGate, SinkLogit, GradSinkLogit,
    sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, sv_b, sv_h, sv_t, sv_d, sd_b, sd_h, sd_t, sd_d, sg_b,
    sg_h, sg_t, rows, tiles, H, T, S, period, phase, first, last, mirror_first, mirror_last, sinks, scale, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
    BY_TOKEN: tl.constexpr, Q_BY_TOKEN: tl.constexpr, RING: tl.constexpr, SEGMENTS: tl.constexpr, SINKS: tl.constexpr,
    PER_HEAD: tl.constexpr, MIRROR: tl.constexpr, SKIP: tl.constexpr, ADD: tl.constexpr, BOTH: tl.constexpr,
    MASS: tl.constexpr, GATED: tl.constexpr, LSE: tl.constexpr, SKIP_LSE: tl.constexpr, SINK_LOGIT: tl.constexpr,
    DESCRIBED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """GradQ of one tile of BM query rows of one residue, added to what is there with ADD.

    BY_TOKEN, Q_BY_TOKEN: Out and GradQ are [B, T, H, D]. BS > 0: the local band holds the sinks beyond it, too.
    DESCRIBED: K and V are tensor descriptors; SinkK and SinkV are the keys and values as pointers.
    The local band comes first and makes the terms of all rows; with SKIP they are there.
    """
    rows = tl.cast(rows, tl.int64)
    tile, row_of_heads = tile_of_head(tl.program_id(0), tiles, GROUP)
    batch, head, group = row_of_heads // H, row_of_heads % H, row_of_heads % H // GROUP
    period, phase, first, last, mirror_first, mirror_last = band_of_head(
        Bands, head, period, phase, first, last, mirror_first, mirror_last, PER_HEAD
    )
    residues = tl.minimum(period, T)
    residue, row0 = tile % residues, tile // residues * BM
    rows_here = tl.cdiv(T - residue, period)
    if row0 < rows_here:
        row = row0 + tl.arange(0, BM)
        token = residue + row * period
        present = token < T
        offset = S - T + residue
        wide = batch.to(tl.int64)
        Starts += wide * S
        Q += wide * sq_b + head.to(tl.int64) * sq_h
        GradOut += wide * sd_b + head.to(tl.int64) * sd_h
        of_key, of_value = wide * sk_b + group.to(tl.int64) * sk_h, wide * sv_b + group.to(tl.int64) * sv_h
        if not DESCRIBED:
            K += of_key
            V += of_value
        of_head = row_of_heads.to(tl.int64) * T
        q = load_rows(Q, sq_t, sq_d, token, present, D, BD)
        d_out = load_rows(GradOut, sd_t, sd_d, token, present, D, BD)
        lse = tl.load(Lse + of_head + token, mask=present, other=0.0)
        if SKIP:
            weight = tl.load(Terms + 2 * rows + of_head + token, mask=present, other=0.0)
            shift = tl.load(Terms + 3 * rows + of_head + token, mask=present, other=0.0)
        else:
            Gate += wide * sg_b + head.to(tl.int64) * sg_h
            if SINK_LOGIT:
                SinkLogit += head
            weight, shift = row_terms(
                d_out, lse, Out, SkipOut, SkipLse, GradLse, GradSkipLse, Gate, Terms, GradGate,
                SinkLogit, GradSinkLogit, batch, head, H, T, token, present, rows, sg_t,
                D, BD, BM, BY_TOKEN, BOTH, MASS, GATED, LSE, SKIP_LSE, SINK_LOGIT,
            )  # fmt: skip
        query_tag = load_query_tags(Starts, S - T + token, present, SEGMENTS)
        row_end = tl.minimum(row0 + BM, rows_here) - 1
        dq = tl.zeros([BM, BD], tl.float32)
        dq = _side_of_query(
            q, d_out, dq, lse, weight, shift, K, V, batch, group, Starts, sk_t, sk_d, sv_t, sv_d,
            row0, row_end, row, query_tag, offset, offset - phase, period, S, first, last, sinks, scale_log2,
            D, BD, BN, RING, SEGMENTS, SINKS, DESCRIBED, SOFTCAP, PRECISION,
        )  # fmt: skip
        if MIRROR:
            dq = _side_of_query(
                q, d_out, dq, lse, weight, shift, K, V, batch, group, Starts, sk_t, sk_d, sv_t, sv_d,
                row0, row_end, row, query_tag, offset, offset + phase, period, S, mirror_first, mirror_last, sinks,
                scale_log2, D, BD, BN, RING, SEGMENTS, SINKS, DESCRIBED, SOFTCAP, PRECISION,
            )  # fmt: skip
        if BS:
            start = next_start(query_tag, -1)
            while start < ABSENT:
                dq = _sinks_of_query(
                    q, d_out, dq, lse, weight, shift, SinkK + of_key, SinkV + of_value, sk_t, sk_d, sv_t, sv_d,
                    start, S - T + token, query_tag, offset + row_end, S, last, sinks, scale_log2,
                    D, BD, BS, SOFTCAP, PRECISION,
                )  # fmt: skip
                start = next_start(query_tag, start)
        begin, step = place_of_head(batch, head, H, T, D, Q_BY_TOKEN)
        store_rows(GradQ + begin, step, token, present, dq * scale, D, BD, ADD)


@triton.jit(do_not_specialize=RUN_TIME)
def band_backward_key_kernel(
    Q, K, V, Starts, Bands, Members, GradOut, Lse, Terms, GradK, GradV,
    sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, sv_b, sv_h, sv_t, sv_d, sd_b, sd_h, sd_t, sd_d,
    rows, tiles, H, T, S, period, phase, first, last, mirror_first, mirror_last, sinks, classes, scale, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    K_BY_TOKEN: tl.constexpr, V_BY_TOKEN: tl.constexpr,
    RING: tl.constexpr, SEGMENTS: tl.constexpr, SINKS: tl.constexpr, PER_HEAD: tl.constexpr,
    MIRROR: tl.constexpr, SKIP: tl.constexpr, ADD: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """GradK and GradV [B, classes, G, S, D] of one tile of BM key rows of one residue.

    K_BY_TOKEN, V_BY_TOKEN: they are [B, S, G, D].
    A class holds the query heads of a group that have one period: their queries of a tile of keys are runs of rows.
    With PER_HEAD the table Members [G, classes, 1 + GROUP] says how many and which; else a group is one class.
    """
    rows = tl.cast(rows, tl.int64)
    if SKIP:
        Terms += 2 * rows
    groups = H // GROUP
    tile, unit = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, group = unit // (groups * classes), unit % groups
    head0, members = group * GROUP, GROUP
    if PER_HEAD:
        Members += (group * classes + unit // groups % classes) * (GROUP + 1)
        members = tl.load(Members)
        head0 = tl.load(Members + 1)
        period = tl.load(Bands + head0 * 6)
    residue = tile % period
    offset = S - T + residue
    row0 = tile // period * BM - offset // period
    row_end = tl.minimum(row0 + BM - 1, (S - 1 - offset + period) // period - 1)
    if row0 <= row_end:
        key_row = row0 + tl.arange(0, BM)
        position = offset + key_row * period
        present = key_row <= row_end
        wide = batch.to(tl.int64)
        Starts += wide * S
        k = load_rows(K + wide * sk_b + group.to(tl.int64) * sk_h, sk_t, sk_d, position, present, D, BD)
        v = load_rows(V + wide * sv_b + group.to(tl.int64) * sv_h, sv_t, sv_d, position, present, D, BD)
        key_tag = load_key_tags(Starts, position, present, sinks, SEGMENTS, SINKS)
        if SINKS and not SEGMENTS:
            key_row = tl.where(position < sinks, ABSENT, key_row)
        dk = tl.zeros([BM, BD], tl.float32)
        dv = tl.zeros([BM, BD], tl.float32)
        for number in tl.range(0, members):
            member = head0 + number
            if PER_HEAD:
                member = tl.load(Members + 1 + number)
            _, phase, first, last, mirror_first, mirror_last = band_of_head(
                Bands, member, period, phase, first, last, mirror_first, mirror_last, PER_HEAD
            )
            of_head = (wide * H + member) * T
            q_of_head = Q + wide * sq_b + member.to(tl.int64) * sq_h
            d_of_head = GradOut + wide * sd_b + member.to(tl.int64) * sd_h
            dk, dv = _side_of_key(
                k, v, dk, dv, q_of_head, d_of_head, Starts,
                Lse + of_head, Terms + of_head, Terms + rows + of_head, sq_t, sq_d, sd_t, sd_d,
                row0, row_end, key_row, key_tag, offset, offset + phase, period, T, S, first, last, sinks, scale_log2,
                D, BD, BN, RING, SEGMENTS, SINKS, SOFTCAP, PRECISION,
            )  # fmt: skip
            if MIRROR:
                dk, dv = _side_of_key(
                    k, v, dk, dv, q_of_head, d_of_head, Starts,
                    Lse + of_head, Terms + of_head, Terms + rows + of_head, sq_t, sq_d, sd_t, sd_d,
                    row0, row_end, key_row, key_tag, offset, offset - phase, period, T, S, mirror_first, mirror_last,
                    sinks, scale_log2,
                    D, BD, BN, RING, SEGMENTS, SINKS, SOFTCAP, PRECISION,
                )  # fmt: skip
        share, shares = unit % (groups * classes), groups * classes
        begin, step = place_of_head(batch, share, shares, S, D, K_BY_TOKEN)
        store_rows(GradK + begin, step, position, present, dk * scale, D, BD, ADD)
        begin, step = place_of_head(batch, share, shares, S, D, V_BY_TOKEN)
        store_rows(GradV + begin, step, position, present, dv, D, BD, ADD)
