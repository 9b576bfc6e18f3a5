"""Backward kernel of a skip band of few keys: all gradients in one pass over queries, keys and values."""

import triton
import triton.language as tl

from pi_attention.ops.fused.kernels.backward import weights
from pi_attention.ops.fused.kernels.steps import (
    RUN_TIME,
    band_of_head,
    load_key_tags,
    load_query_tags,
    load_rows,
    soft_cap,
    store_rows,
    through_soft_cap,
    visible,
)


@triton.jit
def _keys(
    K, V, Starts, sk_t, sk_d, sv_t, sv_d, row0, offset, period, S, sinks,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Key rows from row0 on: keys, values, rows, positions, tags, and which are there."""
    row = row0 + tl.arange(0, ROWS)
    position = offset + row * period
    present = (position >= 0) & (position < S)
    k = load_rows(K, sk_t, sk_d, position, present, D, BD)
    v = load_rows(V, sv_t, sv_d, position, present, D, BD)
    return k, v, row, position, load_key_tags(Starts, position, present, sinks, SEGMENTS, SINKS), present


@triton.jit
def _queries(
    Q, GradOut, Starts, Lse, Weight, Shift, sq_t, sq_d, sd_t, sd_d, row0, offset, period, T, S,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Query rows from row0 on: queries, gradients, log-sum-exps, terms, rows, tokens, tags, and which are there."""
    row = row0 + tl.arange(0, ROWS)
    token = offset - (S - T) + row * period
    present = (token >= 0) & (token < T)
    q = load_rows(Q, sq_t, sq_d, token, present, D, BD)
    d_out = load_rows(GradOut, sd_t, sd_d, token, present, D, BD)
    lse = tl.load(Lse + token, mask=present, other=0.0)
    weight = tl.load(Weight + token, mask=present, other=0.0)
    shift = tl.load(Shift + token, mask=present, other=0.0)
    return q, d_out, lse, weight, shift, row, token, load_query_tags(Starts, S - T + token, present, SEGMENTS), present


@triton.jit
def _block(
    q, d_out, lse, weight, shift, row, query_tag, k, v, key_row, key_tag, first, last, scale_log2,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w·P and dS of a tile of queries and keys, in the dtype of the queries."""
    seen = visible(row[:, None], key_row[None, :], query_tag[:, None], key_tag[None, :], first, last, True)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, BD] @ [BD, N] -> [M, N]
    score, factor = soft_cap(score, scale_log2, SOFTCAP)
    p = weights(score, lse[:, None], seen, factor)
    d_weight = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)  # [M, BD] @ [BD, N] -> [M, N]
    d_score = through_soft_cap(p * (weight[:, None] * d_weight - shift[:, None]), score, SOFTCAP)
    return (p * weight[:, None]).to(q.dtype), d_score.to(q.dtype)


@triton.jit(do_not_specialize=RUN_TIME)
def skip_backward_kernel(
    Q, K, V, Starts, Bands, GradOut, Lse, Terms, GradQ, GradK, GradV,
    sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, sv_b, sv_h, sv_t, sv_d, sd_b, sd_h, sd_t, sd_d,
    rows, tiles, H, T, S, period, phase, first, last, mirror_first, mirror_last, sinks, scale, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, SEGMENTS: tl.constexpr,
    SINKS: tl.constexpr, PER_HEAD: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of BM key rows of one residue, and the query rows of the same numbers; last − 1 ≤ BP, G = H.

    The keys are seen by these queries and the BP after them, the queries see these keys and the BP before them. Writes
    GradK and GradV [B, H, S, D], and adds to GradQ [B, H, T, D]; one accumulator at a time.
    """
    rows = tl.cast(rows, tl.int64)
    Terms += 2 * rows
    tile, row_of_heads = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    batch, head = row_of_heads // H, row_of_heads % H
    period, phase, first, last, mirror_first, mirror_last = band_of_head(
        Bands, head, period, phase, first, last, mirror_first, mirror_last, PER_HEAD
    )
    offset = S - T + tile % period
    row0 = tile // period * BM - offset // period
    if offset + row0 * period < S:
        wide = batch.to(tl.int64)
        Starts += wide * S
        K += wide * sk_b + head.to(tl.int64) * sk_h
        V += wide * sv_b + head.to(tl.int64) * sv_h
        Q += wide * sq_b + head.to(tl.int64) * sq_h
        GradOut += wide * sd_b + head.to(tl.int64) * sd_h
        of_head = row_of_heads.to(tl.int64) * T
        of_keys = row_of_heads.to(tl.int64) * S * D
        k, v, key_row, position, key_tag, present = _keys(
            K, V, Starts, sk_t, sk_d, sv_t, sv_d, row0, offset, period, S, sinks, D, BD, BM, SEGMENTS, SINKS
        )
        q, d_out, lse, weight, shift, row, token, tag, asked = _queries(
            Q, GradOut, Starts, Lse + of_head, Terms + of_head, Terms + rows + of_head,
            sq_t, sq_d, sd_t, sd_d, row0, offset + phase, period, T, S, D, BD, BM, SEGMENTS,
        )  # fmt: skip
        p, d_score = _block(
            q, d_out, lse, weight, shift, row, tag, k, v, key_row, key_tag, first, last, scale_log2,
            SOFTCAP, PRECISION,
        )  # fmt: skip
        q_after, d_after, lse_after, weight_after, shift_after, row_after, _, tag_after, _ = _queries(
            Q, GradOut, Starts, Lse + of_head, Terms + of_head, Terms + rows + of_head,
            sq_t, sq_d, sd_t, sd_d, row0 + BM, offset + phase, period, T, S, D, BD, BP, SEGMENTS,
        )  # fmt: skip
        p_after, d_score_after = _block(
            q_after, d_after, lse_after, weight_after, shift_after, row_after, tag_after, k, v, key_row, key_tag,
            first, last, scale_log2, SOFTCAP, PRECISION,
        )  # fmt: skip
        dv = tl.dot(tl.trans(p), d_out, input_precision=PRECISION)  # [BM, BM] @ [BM, BD] -> [BM, BD]
        dv = tl.dot(tl.trans(p_after), d_after, dv, input_precision=PRECISION)  # [BM, BP] @ [BP, BD] -> [BM, BD]
        store_rows(GradV + of_keys, D, position, present, dv, D, BD, False)
        dk = tl.dot(tl.trans(d_score), q, input_precision=PRECISION)  # [BM, BM] @ [BM, BD] -> [BM, BD]
        dk = tl.dot(tl.trans(d_score_after), q_after, dk, input_precision=PRECISION)  # [BM, BP] @ [BP, BD] -> [BM, BD]
        store_rows(GradK + of_keys, D, position, present, dk * scale, D, BD, False)
        k_before, v_before, row_before, _, tag_before, _ = _keys(
            K, V, Starts, sk_t, sk_d, sv_t, sv_d, row0 - BP, offset, period, S, sinks, D, BD, BP, SEGMENTS, SINKS
        )
        _, d_score_before = _block(
            q, d_out, lse, weight, shift, row, tag, k_before, v_before, row_before, tag_before, first, last,
            scale_log2, SOFTCAP, PRECISION,
        )  # fmt: skip
        dq = tl.dot(d_score, k, input_precision=PRECISION)  # [BM, BM] @ [BM, BD] -> [BM, BD]
        dq = tl.dot(d_score_before, k_before, dq, input_precision=PRECISION)  # [BM, BP] @ [BP, BD] -> [BM, BD]
        store_rows(GradQ + of_head * D, D, token, asked, dq * scale, D, BD, True)
