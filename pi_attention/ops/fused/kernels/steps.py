"""The inner steps that all kernels share: where a tile lies, which lags are visible, the online softmax.

A band of stride π is a run of rows of the sequence in residue order: row r of residue ρ is the token at position
p₀ + ρ + r·π, with p₀ = S − T the position of query 0. A band of phase φ pairs the query rows of residue ρ with the key
rows of residue ρ − φ, and its mirror image those with the key rows of residue ρ + φ. Key rows may be negative.

Letters: BM query rows of a tile · BN key rows · BD head dim, padded to a power of two.
"""

import triton
import triton.language as tl

RUN_TIME = ["tiles", "H", "T", "S", "period", "phase", "first", "last", "mirror_first", "mirror_last", "sinks"]
RUN_TIME += ["classes", "chunks", "groups", "window", "splits", "rows", "sg_b", "sg_h", "sg_t"]
"""Arguments that vary from call to call: no value of theirs is compiled in."""

ABSENT = tl.constexpr(1 << 30)
"""Key row of an absent key: no lag from it is in a band."""

BY_TAG, BY_START = tl.constexpr(1), tl.constexpr(2)
"""SEGMENTS: tags of queries and keys are compared; of a causal band, a query's keys are those from its start on."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def band_of_head(Bands, head, period, phase, first, last, mirror_first, mirror_last, PER_HEAD: tl.constexpr):
    """Period, phase, and the row lags [first, last) and [mirror_first, mirror_last) of a head."""
    if PER_HEAD:
        period = tl.load(Bands + head * 6)
        phase = tl.load(Bands + head * 6 + 1)
        first = tl.load(Bands + head * 6 + 2)
        last = tl.load(Bands + head * 6 + 3)
        mirror_first = tl.load(Bands + head * 6 + 4)
        mirror_last = tl.load(Bands + head * 6 + 5)
    return period, phase, first, last, mirror_first, mirror_last


@triton.jit
def tile_of_head(program, tiles, GROUP: tl.constexpr):
    """The tile of query rows of a program, and its head among those of all batch rows.

    The query heads of a key head take a tile one after another: they read the same keys.
    """
    of_group, within = program // (tiles * GROUP), program % (tiles * GROUP)
    return within // GROUP, of_group * GROUP + within % GROUP


@triton.jit
def first_row(origin, period):
    """The least row r with origin + r·period ≥ 0."""
    return tl.where(origin >= 0, -(origin // period), (period - 1 - origin) // period)


@triton.jit
def last_row(origin, period, length):
    """The largest row r with origin + r·period < length, for origin < length + 2·period."""
    return (length - 1 - origin + 2 * period) // period - 2


@triton.jit
def place_of_head(batch, head, heads, length, D: tl.constexpr, BY_TOKEN: tl.constexpr):
    """Where the rows of a head of a dense tensor begin, and from one to the next: [B, heads, length, D] or by token."""
    if BY_TOKEN:
        begin = (batch.to(tl.int64) * length * heads + head) * D
        step = heads * D
    else:
        begin = (batch.to(tl.int64) * heads + head) * length * D
        step = D
    return begin, step


@triton.jit
def load_rows(X, stride_t, stride_d, token, present, D: tl.constexpr, BD: tl.constexpr):
    """Rows of a tensor by token index, zero where absent: [rows, BD]."""
    dim = tl.arange(0, BD)
    mask = present[:, None]
    if D != BD:
        mask = mask & (dim < D)[None, :]
    return tl.load(X + token.to(tl.int64)[:, None] * stride_t + dim[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def load_tile(
    X, stride_t, stride_d, batch, head, token0, token, present,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The same for a tile of a band; where X is a tensor descriptor, the rows are neighbours from token0 on."""
    if DESCRIBED:
        rows = X.load([batch, head, token0, 0]).reshape(ROWS, BD)
    else:
        rows = load_rows(X, stride_t, stride_d, token, present, D, BD)
    return rows


@triton.jit
def store_rows(X, stride_t, token, present, value, D: tl.constexpr, BD: tl.constexpr, ADD: tl.constexpr):
    """Write rows [rows, BD] of a tensor whose head dim is contiguous, or add to what is there."""
    dim = tl.arange(0, BD)
    mask = present[:, None]
    if D != BD:
        mask = mask & (dim < D)[None, :]
    pointer = X + token.to(tl.int64)[:, None] * stride_t + dim[None, :]
    if ADD:
        value += tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointer, value.to(X.dtype.element_ty), mask=mask)


@triton.jit
def load_key_tags(Starts, position, present, sinks, SEGMENTS: tl.constexpr, SINKS: tl.constexpr):
    """Segment start of each key, −1 where it is absent, padding, or a sink (which the skip band leaves out)."""
    tag = tl.load(Starts + position, mask=present, other=-1) if SEGMENTS else tl.where(present, 0, -1)
    if SINKS:
        tag = tl.where(position - tag < sinks, -1, tag)
    return tag


@triton.jit
def load_query_tags(Starts, position, present, SEGMENTS: tl.constexpr):
    """Segment start of each query, −2 where it is absent or padding, so that it equals no key's."""
    if SEGMENTS:
        tag = tl.load(Starts + position, mask=present, other=-2)
        tag = tl.where(tag < 0, -2, tag)
    else:
        tag = tl.where(present, 0, -2)
    return tag


@triton.jit
def visible(query_row, key_row, query_tag, key_tag, first, last, TAGS: tl.constexpr):
    """Which pairs of a tile are in the band, first ≤ lag < last, and with TAGS in one segment; arguments broadcast."""
    beyond_first = (query_row - first) - key_row
    seen = beyond_first.to(tl.uint32, bitcast=True) < (last - first).to(tl.uint32, bitcast=True)
    if TAGS:
        seen = seen & (query_tag == key_tag)
    return seen


@triton.jit
def in_one_segment(Starts, query0, query1, key0, key1, sinks, SINKS: tl.constexpr):
    """Whether the positions [query0, query1] and [key0, key1] lie in one segment, with no sink among the keys.

    Then the tags of a tile need not be compared. A segment is one run, so its ends tell.
    """
    some = key0 <= key1
    start = tl.load(Starts + query0)  # no load waits for another: a short tile would take as long as they do
    alike = some & (start >= 0) & (tl.load(Starts + query1) == start)
    alike = alike & (tl.load(Starts + key0, mask=some, other=-1) == start)
    alike = alike & (tl.load(Starts + key1, mask=some, other=-1) == start)
    if SINKS:
        alike = alike & (key0 - start >= sinks)
    return alike


@triton.jit
def after_starts(query_tag, row, begin, offset, period, first, last, sinks, SINKS: tl.constexpr):
    """For BY_START: where a tile's keys begin, and the end of the lags of each query, [BM, 1].

    A segment is one run, so no key's tag is needed: a query sees its band from the start of its segment on, with SINKS
    from the end of the segment's sinks on.
    """
    start = query_tag
    if SINKS:
        start += sinks
    first_key = first_row(offset - tl.where(query_tag < 0, ABSENT, start), period)
    last = tl.maximum(tl.minimum(last, row - first_key + 1), first)
    return tl.maximum(begin, tl.min(first_key)), last[:, None]


@triton.jit
def next_start(tags, after):
    """The least segment start among the tags that lies beyond `after`, or ABSENT."""
    return tl.min(tl.where(tags > after, tags, ABSENT), 0)


@triton.jit
def tanh(x):
    """To rounding: an odd polynomial near 0, where 1 − 2 / (exp(2x) + 1) would lose digits (Cephes' tanhf)."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    size = tl.abs(x)
    large = 1.0 - 2.0 / (tl.math.exp2(size * (2.0 * LOG2E)) + 1.0)
    return tl.where(size < 0.625, x + x * square * series, tl.where(x < 0.0, -large, large))


@triton.jit
def soft_cap(score, scale_log2, SOFTCAP: tl.constexpr):
    """Scores and their factor in base 2; with SOFTCAP > 0, cap·tanh(scaled score / cap) in base 2 and 1."""
    if SOFTCAP > 0.0:
        score = tanh(score * (scale_log2 * LN2 / SOFTCAP)) * (SOFTCAP * LOG2E)
        scale_log2 = 1.0
    return score, scale_log2


@triton.jit
def through_soft_cap(d_score, score, SOFTCAP: tl.constexpr):
    """Gradient of scaled scores from that of the capped ones, which `soft_cap` gave."""
    if SOFTCAP > 0.0:
        capped = score / (SOFTCAP * LOG2E)
        d_score = d_score * (1.0 - capped * capped)
    return d_score


@triton.jit
def start_of_softmax(BM: tl.constexpr, BD: tl.constexpr):
    """Output, maximum and sum of an online softmax over no keys yet."""
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    return acc, m, l


@triton.jit
def online_softmax(score, scale_log2, m, l):
    """Running maximum m (scaled) and sum l, in base 2, with one more tile of scores: its weights, the past's factor."""
    m_new = tl.maximum(m, tl.max(score, 1) * scale_log2)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    weight = tl.math.exp2(score * scale_log2 - shift[:, None])
    past = tl.math.exp2(m - shift)
    return weight, past, m_new, l * past + tl.sum(weight, 1)


@triton.jit
def end_of_softmax(acc, m, l):
    """Output and natural log-sum-exp of an online softmax; 0 and −inf where nothing was visible."""
    empty = l == 0.0
    out = acc / tl.where(empty, 1.0, l)[:, None]
    return out, tl.where(empty, float("-inf"), (m + tl.math.log2(tl.where(empty, 1.0, l))) * LN2)


@triton.jit
def gate_weight(lse_local, lse_skip, logit, MASS: tl.constexpr):
    """Weight g of the local band: sigmoid(a), or sigmoid(λ − μ + a); 1 where there is no skip key."""
    no_skip = lse_skip == float("-inf")
    if MASS:
        logit += tl.where(no_skip, 0.0, lse_local - lse_skip)
    return tl.where(no_skip, 1.0, 1.0 / (1.0 + tl.math.exp2(-logit * LOG2E)))


@triton.jit
def keep_share(lse, sink_logit):
    """What a sink logit leaves the keys in a softmax: sigmoid(lse − z); 0 without keys."""
    empty = lse == float("-inf")
    return tl.where(empty, 0.0, 1.0 / (1.0 + tl.math.exp2((sink_logit - tl.where(empty, 0.0, lse)) * LOG2E)))


@triton.jit
def share_of(term, other, another):
    """exp(term) / (exp(term) + exp(other) + exp(another)); 0 where the term is −inf."""
    empty = term == float("-inf")
    term = tl.where(empty, 0.0, term)
    total = 1.0 + tl.math.exp2((other - term) * LOG2E) + tl.math.exp2((another - term) * LOG2E)
    return tl.where(empty, 0.0, 1.0 / total)


@triton.jit
def band_weights(lse_local, lse_skip, logit, sink_logit, MASS: tl.constexpr):
    """Factors of the outputs of the local and the skip band, beside a sink logit."""
    if MASS:
        raised = lse_local + tl.where(lse_skip == float("-inf"), 0.0, logit)
        weight, skip_weight = share_of(raised, lse_skip, sink_logit), share_of(lse_skip, raised, sink_logit)
    else:
        g = gate_weight(lse_local, lse_skip, logit, MASS)
        weight = g * keep_share(lse_local, sink_logit)
        skip_weight = (1.0 - g) * keep_share(lse_skip, sink_logit)
    return weight, skip_weight
