"""What the Hopper kernels share: copies, barriers, the range of a tile, the gate."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in Triton 3.8
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

RUN_TIME = ["total", "tiles", "H", "T", "S", "period", "phase", "first", "last", "span", "sinks", "rows"]
RUN_TIME += ["sg_b", "sg_h", "sg_t"]
"""Arguments that vary from call to call: no value of theirs is compiled in."""

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
HIDDEN = gl.constexpr(1 << 30)
"""Start of the segment of padding: no key comes after it."""


@gluon.jit
def barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """One barrier for each slot of a ring, complete after so many arrivals."""
    ring = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ring.index(slot), count=ARRIVALS)
    return ring


@gluon.jit
def lags_of_head(Bands, head, phase, first, last, PER_HEAD: gl.constexpr):
    """Phase and row lags [first, last) of a head's band: from the table `Bands` where heads differ."""
    if PER_HEAD:
        phase = gl.load(Bands + head * 6 + 1)
        first = gl.load(Bands + head * 6 + 2)
        last = gl.load(Bands + head * 6 + 3)
    return phase, first, last


@gluon.jit
def keys_of_residue(residue, period, phase, first):
    """The residue of the keys that queries of a residue see, and how far these are counted up.

    Key row j counts as j + shift, by which query row r sees (r − span, r], as in the local band.
    """
    of_key = residue - phase
    before = of_key < 0
    return gl.where(before, of_key + period, of_key), gl.where(before, first + 1, first)


@gluon.jit
def rows_of_sinks(sinks, of_key, period):
    """Rows of a residue that are sinks."""
    return (gl.maximum(sinks - of_key, 0) + period - 1) // period


@gluon.jit
def place_of_tile(tile, tiles, H, GROUP: gl.constexpr):
    """Batch and head of a tile of queries, and its number in its head.

    The query heads of a key head take a tile one after another, as in `kernels.steps.tile_of_head`.
    """
    row_of_heads = tile // (tiles * GROUP) * GROUP + tile % GROUP
    return row_of_heads // H, row_of_heads % H, tile % (tiles * GROUP) // GROUP


@gluon.jit
def place_of_head(batch, head, heads, length, D: gl.constexpr, BY_TOKEN: gl.constexpr):
    """As `kernels.steps.place_of_head`: where the rows of a head begin, and from one to the next."""
    if BY_TOKEN:
        begin = (batch.to(gl.int64) * length * heads + head) * D
        step = heads * D
    else:
        begin = (batch * heads + head).to(gl.int64) * length * D
        step = D
    return begin, step


@gluon.jit
def rows_of_tile(number, period, length, ROWS: gl.constexpr, SKIP: gl.constexpr):
    """Of a head's tile of ROWS rows: its residue, its first row there, and how many rows the residue has."""
    residue, row0 = 0, number * ROWS
    if SKIP:
        residue, row0, length = number % period, number // period * ROWS, length // period
    return residue, row0, length


@gluon.jit
def range_of_rows(
    tile, Bands, tiles, H, T, S, period, phase, first, last, sinks,
    GROUP: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, SKIP: gl.constexpr, PER_HEAD: gl.constexpr,
):  # fmt: skip
    """Of a tile of BQ query rows: where it lies, and the tiles of BN keys that it walks.

    Returns batch, head, residue, first row; then `begin`, the first and the end of the band's tiles, the tiles of
    sinks; then residue, shift (see `keys_of_residue`), span and the lowest of the keys.

    Band tile i begins at key `begin` + i·BN, first_tile ≤ i < steps. Tiles of sinks come before, counted backwards from
    `first_tile`; there are none where the window covers all sinks.
    """
    batch, head, number = place_of_tile(tile, tiles, H, GROUP)
    residue, row0, length = rows_of_tile(number, period, T, BQ, SKIP)
    of_key, shift, low = 0, 0, 0
    if SKIP:
        phase, first, last = lags_of_head(Bands, head, phase, first, last, PER_HEAD)
        of_key, shift = keys_of_residue(residue, period, phase, first)
        low = shift + rows_of_sinks(sinks, of_key, period)
    span = last - first
    position0 = S - T + row0
    back = (span + BN - 2) // BN
    begin = position0 - back * BN
    first_tile = gl.maximum(low - begin, 0) // BN
    rows = gl.minimum(BQ, length - row0)
    sink_tiles = 0
    if not SKIP:
        sink_tiles = (gl.maximum(gl.minimum(sinks, position0 + rows - span), 0) + BN - 1) // BN
    steps = back + (rows + BN - 1) // BN
    return batch, head, residue, row0, begin, first_tile, steps, sink_tiles, of_key, shift, span, low


@gluon.jit
def tiles_of_half(first_tile, span, WHICH: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """Of the band's tiles that two consumers walk, those [first, end) that rows [WHICH·BM, (WHICH + 1)·BM) need."""
    end = (span + BN - 2) // BN + (WHICH + 1) * (BM // BN)
    return gl.maximum(first_tile, WHICH * (BM // BN)), end


@gluon.jit
def lowest_keys(Starts, batch, position, position0, present, S, span, lowest, BM: gl.constexpr, SEGMENTS: gl.constexpr):
    """The first key of each query's window and segment, and the first key that is in one segment with all rows."""
    low = gl.maximum(position - span + 1, lowest)
    one_from = lowest
    if SEGMENTS:
        of_batch = Starts + batch.to(gl.int64) * S
        start = gl.load(of_batch + position, mask=present, other=-1)
        low = gl.maximum(low, gl.where(start < 0, HIDDEN, start))
        one_from = gl.load(of_batch + gl.minimum(position0 + BM, S) - 1)
        one_from = gl.where(one_from < 0, HIDDEN, one_from)
    return low, one_from


@gluon.jit
def seen_keys(key, position, low, of_sinks, sinks, span):
    """Which keys of a tile each query sees: those of its band and segment, or the sinks beyond its window."""
    lowest = gl.where(of_sinks, 0, low)
    highest = gl.where(of_sinks, gl.minimum(position - span, sinks - 1), position)
    return (key[None, :] >= lowest[:, None]) & (key[None, :] <= highest[:, None])


@gluon.jit
def gate_weight(lse_local, lse_skip, logit, MASS: gl.constexpr):
    """Weight g of the local band: sigmoid(a), or sigmoid(λ − μ + a); 1 where there is no skip key."""
    no_skip = lse_skip == float("-inf")
    if MASS:
        logit += gl.where(no_skip, 0.0, lse_local - lse_skip)
    return gl.where(no_skip, 1.0, 1.0 / (1.0 + gl.exp2(-logit * LOG2E)))


@gluon.jit
def gate_logits(Gate, sg_b, sg_h, sg_t, batch, head, token, present, GATED: gl.constexpr):
    """The gate's logits of the rows in fp32; zero without a gate."""
    logit = gl.zeros_like(token).to(gl.float32)
    if GATED:
        gates = Gate + batch.to(gl.int64) * sg_b + head.to(gl.int64) * sg_h + token.to(gl.int64) * sg_t
        logit += gl.load(gates, mask=present, other=0.0).to(gl.float32)
    return logit


@gluon.jit
def online_softmax(score, m, l, scale_log2):
    """Running maximum m (scaled) and sum l, in base 2, with one more tile of scores: its weights, the past's factor."""
    m_new = gl.maximum(m, gl.max(score, 1) * scale_log2)
    shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    weight = gl.exp2(score * scale_log2 - shift[:, None])
    past = gl.exp2(m - shift)
    return weight, past, m_new, l * past + gl.sum(weight, 1)


@gluon.jit
def end_of_softmax(m, l):
    """Sum of the weights, 1 where nothing was visible, and natural log-sum-exp, −inf there."""
    empty = l == 0.0
    l = gl.where(empty, 1.0, l)
    return l, gl.where(empty, float("-inf"), (m + gl.log2(l)) * LN2)


@gluon.jit
def is_edge(key0, position0, one_from, of_sinks, span, BM: gl.constexpr, BN: gl.constexpr):
    """Whether some query of a tile of rows does not see some key of a tile: then keys are compared one by one."""
    return of_sinks | (key0 < gl.maximum(position0 + BM - span, one_from)) | (key0 + BN - 1 > position0)
