"""Decoding kernels: a few new queries against many keys, split over programs by key, and the joining of the parts.

The keys that T queries can see are three lists, each cut into equal parts, one a program: the window of all queries
(w + T − 1 keys), and for each query its m skips and its sinks. Query rows are the heads of a group times T.

PAGED: the keys of all batch rows lie in one tensor of slots, K [slots, G, D], and Starts is a table [B + 1 + ΣS]: where
the slots of each batch row begin in the table, then the slots of its keys, in order. S is a batch row's own then.
"""

import triton
import triton.language as tl

from pi_attention.ops.fused.kernels.steps import (
    LN2,
    RUN_TIME,
    band_of_head,
    band_weights,
    end_of_softmax,
    gate_weight,
    load_key_tags,
    load_query_tags,
    load_rows,
    online_softmax,
    soft_cap,
    start_of_softmax,
    store_rows,
)


@triton.jit
def _attend(
    q, acc, m, l, K, V, Slots, sk_t, sk_d, sv_t, sv_d, position, present, seen, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    if PAGED:
        position = tl.load(Slots + position, mask=present, other=0)
    k = load_rows(K, sk_t, sk_d, position, present, D, BD)
    v = load_rows(V, sv_t, sv_d, position, present, D, BD)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BD] @ [BD, BN] -> [BM, BN]
    score, scale_log2 = soft_cap(score, scale_log2, SOFTCAP)
    score = tl.where(seen, score, float("-inf"))
    weight, past, m, l = online_softmax(score, scale_log2, m, l)
    acc = acc * past[:, None]
    acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)  # [BM, BN] @ [BN, BD] -> [BM, BD]
    return acc, m, l


@triton.jit
def _keys_of_row(Starts, S, batch, PAGED: tl.constexpr):
    """The table, or the segment starts, of a batch row's keys, and their number."""
    if PAGED:
        begin, end = tl.load(Starts + batch), tl.load(Starts + batch + 1)
        Starts += begin
        S = end - begin
    else:
        Starts += batch * S
    return Starts, S


@triton.jit
def _part(length, split, splits):
    """The keys [first, end) of a list that a program takes."""
    size = tl.cdiv(length, splits)
    return split * size, tl.minimum((split + 1) * size, length)


@triton.jit(do_not_specialize=RUN_TIME)
def decode_kernel(
    Q, K, V, Starts, Bands, PartOut, PartLse,
    sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, sv_b, sv_h, sv_t, sv_d,
    splits, H, T, S, period, phase, first, last, mirror_first, mirror_last, sinks, window, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SEGMENTS: tl.constexpr, PER_HEAD: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    PAGED: tl.constexpr,
):  # fmt: skip
    """One part of the keys, for the query heads of one group: PartOut [2, splits, B, H, T, D] and PartLse without D.

    The first index is the band: local with sinks, or skip. Where heads differ in their skips a program takes one head.
    """
    MEMBERS: tl.constexpr = 1 if PER_HEAD else GROUP
    units = H // MEMBERS
    split, unit = tl.program_id(0) % splits, tl.program_id(0) // splits
    batch, head0 = (unit // units).to(tl.int64), unit % units * MEMBERS
    batches = tl.num_programs(0) // (splits * units)
    period, phase, first, last, mirror_first, mirror_last = band_of_head(
        Bands, head0, period, phase, first, last, mirror_first, mirror_last, PER_HEAD
    )
    Starts, S = _keys_of_row(Starts, S, batch, PAGED)
    K += batch * sk_b + (head0 // GROUP).to(tl.int64) * sk_h
    V += batch * sv_b + (head0 // GROUP).to(tl.int64) * sv_h

    line = tl.arange(0, BM)  # of the tile of queries: head by head, T queries each
    head, query = head0 + line // T, line % T
    asked = line < MEMBERS * T
    at = S - T + query
    pointer = Q + batch * sq_b + head.to(tl.int64) * sq_h + query.to(tl.int64) * sq_t
    dim = tl.arange(0, BD)
    q = tl.load(pointer[:, None] + dim[None, :] * sq_d, mask=asked[:, None] & (dim < D)[None, :], other=0.0)
    query_tag = load_query_tags(Starts, at, asked, SEGMENTS)

    acc, m, l = start_of_softmax(BM, BD)
    lowest = S - T - window + 1
    begin, end = _part(window + T - 1, split, splits)
    begin = tl.maximum(begin, -lowest)
    for start in tl.range(begin, end, BN):
        number = start + tl.arange(0, BN)
        position = lowest + number
        key_tag = load_key_tags(Starts, position, number < end, 0, SEGMENTS, False)
        lag = at[:, None] - position[None, :]
        seen = (lag >= 0) & (lag < window) & (query_tag[:, None] == key_tag[None, :])
        acc, m, l = _attend(
            q, acc, m, l, K, V, Starts, sk_t, sk_d, sv_t, sv_d, position, number < end, seen, scale_log2,
            D, BD, SOFTCAP, PRECISION, PAGED,
        )  # fmt: skip
    begin, end = _part(T * sinks, split, splits)
    for start in tl.range(begin, end, BN):
        number = start + tl.arange(0, BN)
        owner = number // sinks
        origin = tl.zeros([BN], tl.int32)
        if SEGMENTS:
            origin = tl.load(Starts + S - T + owner, mask=number < end, other=-1)
        position = origin + number % sinks
        present = (number < end) & (origin >= 0) & (position <= S - T + owner - window)  # beyond its query's window
        seen = present[None, :] & (owner[None, :] == query[:, None]) & asked[:, None]
        acc, m, l = _attend(
            q, acc, m, l, K, V, Starts, sk_t, sk_d, sv_t, sv_d, position, present, seen, scale_log2,
            D, BD, SOFTCAP, PRECISION, PAGED,
        )  # fmt: skip
    part = ((split * batches + batch) * H + head0) * T
    _store_part(PartOut, PartLse, part, line, asked, acc, m, l, D, BD)

    acc, m, l = start_of_softmax(BM, BD)
    skips = last - first
    begin, end = _part(T * skips, split, splits)
    for start in tl.range(begin, end, BN):
        number = start + tl.arange(0, BN)
        owner = number // skips
        position = S - T + owner - phase - (first + number % skips) * period
        present = (number < end) & (position >= 0)
        key_tag = load_key_tags(Starts, position, present, sinks, SEGMENTS, True)
        seen = (query_tag[:, None] == key_tag[None, :]) & (owner[None, :] == query[:, None])
        acc, m, l = _attend(
            q, acc, m, l, K, V, Starts, sk_t, sk_d, sv_t, sv_d, position, present, seen, scale_log2,
            D, BD, SOFTCAP, PRECISION, PAGED,
        )  # fmt: skip
    part += splits * batches * H * T
    _store_part(PartOut, PartLse, part, line, asked, acc, m, l, D, BD)


@triton.jit
def _store_part(PartOut, PartLse, part, line, asked, acc, m, l, D: tl.constexpr, BD: tl.constexpr):
    out, lse = end_of_softmax(acc, m, l)
    part = part.to(tl.int64)
    tl.store(PartLse + part + line, lse, mask=asked)
    store_rows(PartOut + part * D, D, line, asked, out, D, BD, False)


@triton.jit
def _join(PartOut, PartLse, part, step, splits, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr):
    """One softmax over all parts of a row: its output [BD] and log-sum-exp."""
    split = tl.arange(0, BS)
    present = split < splits
    lse = tl.load(PartLse + part + split * step, mask=present, other=float("-inf"))
    largest = tl.max(lse, 0)
    weight = tl.math.exp2((lse - tl.where(largest == float("-inf"), 0.0, largest)) / LN2)
    total = tl.sum(weight, 0)
    safe = tl.where(total == 0.0, 1.0, total)
    out = load_rows(PartOut + part * D, step * D, 1, split, present, D, BD)
    out = tl.sum(out * weight[:, None], 0) / safe
    return out, tl.where(total == 0.0, float("-inf"), largest + tl.math.log2(safe) * LN2)


@triton.jit(do_not_specialize=RUN_TIME)
def join_kernel(
    PartOut, PartLse, Gate, Out, Lse, SkipLse, SinkLogit, sg_b, sg_h, sg_t, rows, H, T, splits,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, MASS: tl.constexpr, GATED: tl.constexpr,
    SINK_LOGIT: tl.constexpr,
):  # fmt: skip
    """Join the parts of one query row of one head, and fuse the bands: Out [B, H, T, D], Lse and SkipLse [B, H, T]."""
    row = tl.program_id(0).to(tl.int64)
    out, lse = _join(PartOut, PartLse, row, rows, splits, D, BD, BS)
    skip_out, lse_skip = _join(PartOut, PartLse, row + splits * rows, rows, splits, D, BD, BS)
    logit = 0.0
    if GATED:
        gates = Gate + row // T // H * sg_b + row // T % H * sg_h + row % T * sg_t
        logit = tl.load(gates).to(tl.float32)
    if SINK_LOGIT:
        sink_logit = tl.load(SinkLogit + row // T % H).to(tl.float32)
        g, rest = band_weights(lse, lse_skip, logit, sink_logit, MASS)
        out = g * out + rest * skip_out
    else:
        g = gate_weight(lse, lse_skip, logit, MASS)
        out = g * out + (1.0 - g) * skip_out
    tl.store(Lse + row, lse)
    tl.store(SkipLse + row, lse_skip)
    dim = tl.arange(0, BD)
    tl.store(Out + row * D + dim, out.to(Out.dtype.element_ty), mask=dim < D)
