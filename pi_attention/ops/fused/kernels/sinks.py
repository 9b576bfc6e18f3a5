"""Gradients of the sinks' keys and values: the queries beyond the window, in chunks, and the sum of the chunks.

A sink is seen by every later query of its segment. So the queries are cut into chunks, each with a program: it adds
what belongs to a segment that starts in its chunk, and leaves what belongs to the one segment that started before as a
share. A second kernel adds the shares of a segment in order. No atomics: a row of a gradient has one writer at a time.
"""

import triton
import triton.language as tl

from pi_attention.ops.fused.kernels.backward import add_to_key
from pi_attention.ops.fused.kernels.steps import (
    ABSENT,
    RUN_TIME,
    load_query_tags,
    load_rows,
    next_start,
    place_of_head,
    store_rows,
)


@triton.jit
def _place(chunks, sinks, BS: tl.constexpr):
    """Chunk of queries, tile of sinks, and row of the batch times key head of a program."""
    tiles = tl.cdiv(sinks, BS)
    rest = tl.program_id(0) // chunks
    return tl.program_id(0) % chunks, rest % tiles, rest // tiles


@triton.jit
def _through_queries(
    k, v, Q, GradOut, Lse, Weight, Shift, Starts, wide, group, sq_b, sq_h, sq_t, sq_d, sd_b, sd_h, sd_t, sd_d,
    start, sink, present, first, last, H, T, S, window, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    SEGMENTS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients dk and dv of a tile of sinks through the queries [first, last) of all heads of the group."""
    dk = tl.zeros([BS, BD], tl.float32)
    dv = tl.zeros([BS, BD], tl.float32)
    for member in tl.range(0, GROUP):
        head = (group * GROUP + member).to(tl.int64)
        of_head = (wide * H + head) * T
        for row in tl.range(first, last, BM):
            token = row + tl.arange(0, BM)
            there = token < last
            position = S - T + token
            q = load_rows(Q + wide * sq_b + head * sq_h, sq_t, sq_d, token, there, D, BD)
            d_out = load_rows(GradOut + wide * sd_b + head * sd_h, sd_t, sd_d, token, there, D, BD)
            lse = tl.load(Lse + of_head + token, mask=there, other=0.0)
            weight = tl.load(Weight + of_head + token, mask=there, other=0.0)
            shift = tl.load(Shift + of_head + token, mask=there, other=0.0)
            query_tag = load_query_tags(Starts, position, there, SEGMENTS)
            seen = present[:, None] & (position[None, :] - sink[:, None] >= window) & (query_tag == start)[None, :]
            dk, dv = add_to_key(k, v, dk, dv, q, d_out, lse, weight, shift, seen, scale_log2, SOFTCAP, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=RUN_TIME)
def sink_backward_kernel(
    Q, K, V, Starts, GradOut, Lse, Terms, GradK, GradV, ShareK, ShareV, Owner,
    sq_b, sq_h, sq_t, sq_d, sk_b, sk_h, sk_t, sk_d, sv_b, sv_h, sv_t, sv_d, sd_b, sd_h, sd_t, sd_d,
    rows, chunks, H, T, S, window, sinks, scale, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, CHUNK: tl.constexpr,
    K_BY_TOKEN: tl.constexpr, V_BY_TOKEN: tl.constexpr, SEGMENTS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of queries, one tile of BS sinks of each segment that they belong to, one key head.

    Adds to GradK and GradV [B, G, S, D] the rows of segments that start in the chunk. Writes the share of the segment
    that started before to ShareK and ShareV [B, G, chunks, sinks, D], and where it started to Owner [B, chunks]; −1
    without one.
    """
    groups = H // GROUP
    chunk, tile, unit = _place(chunks, sinks, BS)
    batch, group = unit // groups, unit % groups
    wide = batch.to(tl.int64)
    token0 = chunk * CHUNK
    token_end = tl.minimum(token0 + CHUNK, T)
    Starts += wide * S
    token = token0 + tl.arange(0, CHUNK)
    tags = load_query_tags(Starts, S - T + token, token < token_end, SEGMENTS)
    start = next_start(tags, -1)
    if (tile == 0) & (group == 0):
        tl.store(Owner + batch * chunks + chunk, tl.where(start < S - T + token0, start, -1))
    while start < ABSENT:
        following = next_start(tags, start)
        sink = start + tile * BS + tl.arange(0, BS)
        present = (sink < start + sinks) & (sink < S)
        k = load_rows(K + wide * sk_b + group.to(tl.int64) * sk_h, sk_t, sk_d, sink, present, D, BD)
        v = load_rows(V + wide * sv_b + group.to(tl.int64) * sv_h, sv_t, sv_d, sink, present, D, BD)
        first = tl.maximum(token0, start + tile * BS + window - (S - T))
        last = tl.minimum(token_end, following - (S - T))
        dk, dv = _through_queries(
            k, v, Q, GradOut, Lse, Terms, Terms + tl.cast(rows, tl.int64), Starts, wide, group,
            sq_b, sq_h, sq_t, sq_d, sd_b, sd_h, sd_t, sd_d,
            start, sink, present, first, last, H, T, S, window, scale_log2,
            GROUP, D, BD, BM, BS, SEGMENTS, SOFTCAP, PRECISION,
        )  # fmt: skip
        if start < S - T + token0:
            of_share = (unit.to(tl.int64) * chunks + chunk) * sinks * D
            store_rows(ShareK + of_share, D, sink - start, present, dk * scale, D, BD, False)
            store_rows(ShareV + of_share, D, sink - start, present, dv, D, BD, False)
        else:
            own = present & (sink < tl.minimum(following, S - T + token_end))  # later chunks see what lies beyond
            begin, step = place_of_head(batch, group, groups, S, D, K_BY_TOKEN)
            store_rows(GradK + begin, step, sink, own, dk * scale, D, BD, True)
            begin, step = place_of_head(batch, group, groups, S, D, V_BY_TOKEN)
            store_rows(GradV + begin, step, sink, own, dv, D, BD, True)
        start = following


@triton.jit(do_not_specialize=RUN_TIME)
def sink_sum_kernel(
    ShareK, ShareV, Owner, Starts, GradK, GradV, chunks, groups, S, sinks,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    K_BY_TOKEN: tl.constexpr, V_BY_TOKEN: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Add the shares of a segment, chunk by chunk, to the gradients of its sinks; by the program of its first share."""
    chunk, tile, unit = _place(chunks, sinks, BS)
    Owner += unit // groups * chunks
    start = tl.load(Owner + chunk)
    before = tl.load(Owner + chunk - 1, mask=chunk > 0, other=-1)
    if (start >= 0) & (before != start):
        number = tile * BS + tl.arange(0, BS)
        sink = start + number
        present = (number < sinks) & (sink < S)
        if SEGMENTS:
            present = present & (tl.load(Starts + unit // groups * S + sink, mask=present, other=-1) == start)
        dk = tl.zeros([BS, BD], tl.float32)
        dv = tl.zeros([BS, BD], tl.float32)
        other = chunk
        while other < chunks:
            for _ in tl.static_range(4):  # loads in flight together
                own = number * 0 + tl.load(Owner + other, mask=other < chunks, other=-1) == start
                of_share = (unit.to(tl.int64) * chunks + other) * sinks * D
                dk += load_rows(ShareK + of_share, D, 1, number, present & own, D, BD)
                dv += load_rows(ShareV + of_share, D, 1, number, present & own, D, BD)
                other += 1
            if tl.load(Owner + other, mask=other < chunks, other=-1) != start:
                other = chunks
        batch, group = unit // groups, unit % groups
        begin, step = place_of_head(batch, group, groups, S, D, K_BY_TOKEN)
        store_rows(GradK + begin, step, sink, present, dk, D, BD, True)
        begin, step = place_of_head(batch, group, groups, S, D, V_BY_TOKEN)
        store_rows(GradV + begin, step, sink, present, dv, D, BD, True)
