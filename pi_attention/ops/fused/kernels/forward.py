"""Forward kernel of one band; for the local band with its sinks, and the fusion gate in its epilogue."""

import triton
import triton.language as tl

from pi_attention.ops.fused.kernels.steps import (
    ABSENT,
    BY_START,
    BY_TAG,
    RUN_TIME,
    after_starts,
    band_of_head,
    band_weights,
    end_of_softmax,
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
    online_softmax,
    place_of_head,
    soft_cap,
    start_of_softmax,
    store_rows,
    tile_of_head,
    visible,
)


@triton.jit
def _tiles(
    q, acc, m, l, K, V, batch, group, Starts, sk_t, sk_d, sv_t, sv_d,
    begin, last_key, row, query_tag, offset, period, S, first, last, sinks, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, RING: tl.constexpr, SEGMENTS: tl.constexpr,
    SINKS: tl.constexpr, TAGS: tl.constexpr, DESCRIBED: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the key rows [begin, last_key] by tiles of BN; TAGS: compare segments, and leave out sinks."""
    for start in tl.range(begin, last_key + 1, BN):
        key_row = start + tl.arange(0, BN)
        position = offset + key_row * period
        if RING:
            position = (position % S + S) % S
        present = key_row <= last_key
        k = load_tile(K, sk_t, sk_d, batch, group, offset + start, position, present, D, BD, BN, DESCRIBED)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BD] @ [BD, BN] -> [BM, BN]
        key_row = tl.where(present, key_row, ABSENT)
        key_tag = key_row
        if TAGS:
            key_tag = load_key_tags(Starts, position, present, sinks, SEGMENTS, SINKS)
        seen = visible(row[:, None], key_row[None, :], query_tag[:, None], key_tag[None, :], first, last, TAGS)
        score, factor = soft_cap(score, scale_log2, SOFTCAP)
        score = tl.where(seen, score, float("-inf"))
        weight, past, m, l = online_softmax(score, factor, m, l)
        v = load_tile(V, sv_t, sv_d, batch, group, offset + start, position, present, D, BD, BN, DESCRIBED)
        acc = acc * past[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)  # [BM, BN] @ [BN, BD] -> [BM, BD]
    return acc, m, l


@triton.jit
def _side(
    q, acc, m, l, K, V, batch, group, Starts, sk_t, sk_d, sv_t, sv_d,
    row0, row_end, row, query_tag, origin, offset, period, S, first, last, sinks, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, RING: tl.constexpr, SEGMENTS: tl.constexpr,
    SINKS: tl.constexpr, DESCRIBED: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to all key rows at lags [first, last) of the tile's rows row0 … row_end.

    Query row 0 is at position `origin`, key row 0 at `offset`.
    """
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
        acc, m, l = _tiles(
            q, acc, m, l, K, V, batch, group, Starts, sk_t, sk_d, sv_t, sv_d,
            begin, last_key, row, query_tag, offset, period, S, first, last, sinks, scale_log2,
            D, BD, BN, RING, SEGMENTS, SINKS, False, DESCRIBED, SOFTCAP, PRECISION,
        )  # fmt: skip
    else:
        acc, m, l = _tiles(
            q, acc, m, l, K, V, batch, group, Starts, sk_t, sk_d, sv_t, sv_d,
            begin, last_key, row, query_tag, offset, period, S, first, last, sinks, scale_log2,
            D, BD, BN, RING, SEGMENTS, SINKS, True, DESCRIBED, SOFTCAP, PRECISION,
        )  # fmt: skip
    return acc, m, l


@triton.jit
def _sinks_of(
    q, acc, m, l, K, V, sk_t, sk_d, sv_t, sv_d, start, position, query_tag, last_position, S, window, sinks,
    scale_log2, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the sinks of the segment from `start` on that lie beyond the window, by tiles of BS."""
    end = tl.minimum(sinks, last_position - window - start + 1)
    for first in tl.range(0, end, BS):
        sink = start + first + tl.arange(0, BS)
        present = (sink < start + sinks) & (sink < S)
        k = load_rows(K, sk_t, sk_d, sink, present, D, BD)
        v = load_rows(V, sv_t, sv_d, sink, present, D, BD)
        seen = present[None, :] & (position[:, None] - sink[None, :] >= window) & (query_tag[:, None] == start)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BD] @ [BD, BS] -> [BM, BS]
        score, factor = soft_cap(score, scale_log2, SOFTCAP)
        score = tl.where(seen, score, float("-inf"))
        weight, past, m, l = online_softmax(score, factor, m, l)
        acc = acc * past[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)  # [BM, BS] @ [BS, BD] -> [BM, BD]
    return acc, m, l


@triton.jit
def _gate_logits(Gate, sg_t, token, present, BM: tl.constexpr, GATED: tl.constexpr):
    logit = tl.zeros([BM], tl.float32)
    if GATED:
        logit += tl.load(Gate + token.to(tl.int64) * sg_t, mask=present, other=0.0).to(tl.float32)
    return logit


@triton.jit(do_not_specialize=RUN_TIME)
def band_forward_kernel(
    Q, K, V, Starts, Bands, Gate, SkipOut, SkipLse, SinkK, SinkV, Out, Lse, SinkLogit,
    sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, sv_b, sv_h, sv_t, sv_d, sg_b, sg_h, sg_t,
    tiles, H, T, S, period, phase, first, last, mirror_first, mirror_last, sinks, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
    BY_TOKEN: tl.constexpr, RING: tl.constexpr, SEGMENTS: tl.constexpr, SINKS: tl.constexpr, PER_HEAD: tl.constexpr,
    MIRROR: tl.constexpr, FUSE: tl.constexpr, MASS: tl.constexpr, GATED: tl.constexpr,
    SINK_LOGIT: tl.constexpr, DESCRIBED: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BM query rows of one residue: Out [B, H, T, D], or BY_TOKEN [B, T, H, D], and Lse [B, H, T].

    DESCRIBED: K and V are tensor descriptors; SinkK and SinkV are the keys and values as pointers.
    BS > 0: the local band takes the sinks beyond it into its softmax, BS at a time. SINKS: the skip band leaves sinks
    out.
    With FUSE, Out is g·(this band) + (1 − g)·SkipOut, g from the gate logits and the two log-sum-exps.
    SINK_LOGIT: the head's sink logit takes its share of Out, and none of Lse.
    """
    tile, row_of_heads = tile_of_head(tl.program_id(0), tiles, GROUP)
    batch, head = row_of_heads // H, row_of_heads % H
    group = head // GROUP
    period, phase, first, last, mirror_first, mirror_last = band_of_head(
        Bands, head, period, phase, first, last, mirror_first, mirror_last, PER_HEAD
    )
    residues = tl.minimum(period, T)
    residue, row0 = tile % residues, tile // residues * BM
    rows = tl.cdiv(T - residue, period)
    if row0 < rows:
        row = row0 + tl.arange(0, BM)
        token = residue + row * period
        present = token < T
        offset = S - T + residue
        Starts += batch.to(tl.int64) * S
        Q += batch.to(tl.int64) * sq_b + head.to(tl.int64) * sq_h
        of_key = batch.to(tl.int64) * sk_b + group.to(tl.int64) * sk_h
        of_value = batch.to(tl.int64) * sv_b + group.to(tl.int64) * sv_h
        if not DESCRIBED:
            K += of_key
            V += of_value
        q = load_rows(Q, sq_t, sq_d, token, present, D, BD)
        query_tag = load_query_tags(Starts, S - T + token, present, SEGMENTS)
        acc, m, l = start_of_softmax(BM, BD)
        row_end = tl.minimum(row0 + BM, rows) - 1
        acc, m, l = _side(
            q, acc, m, l, K, V, batch, group, Starts, sk_t, sk_d, sv_t, sv_d,
            row0, row_end, row, query_tag, offset, offset - phase, period, S, first, last, sinks, scale_log2,
            D, BD, BN, RING, SEGMENTS, SINKS, DESCRIBED, SOFTCAP, PRECISION,
        )  # fmt: skip
        if MIRROR:
            acc, m, l = _side(
                q, acc, m, l, K, V, batch, group, Starts, sk_t, sk_d, sv_t, sv_d,
                row0, row_end, row, query_tag, offset, offset + phase, period, S, mirror_first, mirror_last, sinks,
                scale_log2, D, BD, BN, RING, SEGMENTS, SINKS, DESCRIBED, SOFTCAP, PRECISION,
            )  # fmt: skip
        if BS:
            start = next_start(query_tag, -1)
            while start < ABSENT:
                acc, m, l = _sinks_of(
                    q, acc, m, l, SinkK + of_key, SinkV + of_value, sk_t, sk_d, sv_t, sv_d, start, S - T + token,
                    query_tag, offset + row_end, S, last, sinks, scale_log2, D, BD, BS, SOFTCAP, PRECISION,
                )  # fmt: skip
                start = next_start(query_tag, start)
        out, lse = end_of_softmax(acc, m, l)
        of_head = row_of_heads.to(tl.int64) * T
        begin, step = place_of_head(batch, head, H, T, D, BY_TOKEN)
        tl.store(Lse + of_head + token, lse, mask=present)
        if FUSE:
            lse_skip = tl.load(SkipLse + of_head + token, mask=present, other=float("-inf"))
            Gate += batch.to(tl.int64) * sg_b + head.to(tl.int64) * sg_h
            logit = _gate_logits(Gate, sg_t, token, present, BM, GATED)
            if SINK_LOGIT:
                g, rest = band_weights(lse, lse_skip, logit, tl.load(SinkLogit + head).to(tl.float32), MASS)
                g, rest = g[:, None], rest[:, None]
            else:
                g = gate_weight(lse, lse_skip, logit, MASS)[:, None]
                rest = 1.0 - g
            out = g * out + rest * load_rows(SkipOut + of_head * D, D, 1, token, present, D, BD).to(tl.float32)
        elif SINK_LOGIT:
            out = out * keep_share(lse, tl.load(SinkLogit + head).to(tl.float32))[:, None]
        store_rows(Out + begin, step, token, present, out, D, BD, False)
