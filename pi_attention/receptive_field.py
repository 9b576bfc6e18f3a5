"""What layers can see: reach, coverage, holes, hops, paths, and the keys of each lag, in exact set arithmetic.

A set of positions of a sequence is a Python int, bit p for position p, so that a step of all positions along a band of
lags is a few shifts of a long number: a context of a million tokens and dozens of layers take well under a second.
Layers are taken from the output down: after the first of them a query has seen the keys of its own layer, after the
next the keys of those, and so on. A token always sees itself, so what was seen stays seen.

Of one layer two things order patterns: which lags some head sees (`joint_coverage`), and how many keys a lag has, in
the mean over heads (`key_density`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from pi_attention.pattern import Band, PiPattern


def positions_of(bits: int) -> Iterator[int]:
    """The positions in a set, in increasing order."""
    for start, end in intervals_of(bits):
        yield from range(start, end)


def intervals_of(bits: int) -> Iterator[tuple[int, int]]:
    """A set as disjoint runs [start, end), in increasing order."""
    digits = bin(bits)[:1:-1]  # linear in the length; shifting the runs away would be quadratic in a set with many
    return (run.span() for run in re.finditer("1+", digits))


@dataclass(frozen=True)
class _Sequence:
    """The positions [0, length), on a line or a ring."""

    length: int
    ring: bool

    @property
    def all(self) -> int:
        return (1 << self.length) - 1

    def moved(self, bits: int, lag: int) -> int:
        """The positions `lag` before those in the set; on a line they may lie beyond its end."""
        if self.ring:
            lag %= self.length
            return (bits >> lag | bits << (self.length - lag)) & self.all
        return bits >> lag if lag >= 0 else bits << -lag

    def along(self, bits: int, band: Band) -> int:
        """The positions at the signed lags of a band before those in the set, by doubling."""
        assert band.last is not None
        if not len(band):  # its first lag may be far beyond the sequence
            return 0
        steps, found, at, size = band.last - band.first, 0, 0, 1
        # once moved by the first lag, every further one is positive, and what leaves is gone
        seen = self.moved(bits, band.first * band.stride + band.phase)
        while steps:  # `seen` holds the first `size` lags of the band
            if steps & 1:
                found |= self.moved(seen, at)
                at += size * band.stride
            steps >>= 1
            if steps:
                seen |= self.moved(seen, size * band.stride)
                size *= 2
        return found & self.all


def _step(pattern: PiPattern, where: _Sequence, bits: int) -> int:
    """The keys that queries at these positions see, by any head."""
    found = 0
    for band in {pattern.local_band, *pattern.skip_bands()}:
        for side in pattern.signed_bands(band, where.length):
            found |= where.along(bits, side)
    if pattern.sinks and bits:
        found |= (1 << min(pattern.sinks, bits.bit_length())) - 1
    return found


@dataclass(frozen=True)
class ReceptiveField:
    """What one query position of a sequence sees through 0, 1, … layers.

    Args:
        query: the position.
        context: S, tokens of the sequence.
        seen: sets of positions, after 0, 1, … L layers.
        causal: whether only positions up to the query can be seen.
    """

    query: int
    context: int
    seen: tuple[int, ...]
    causal: bool = True

    @property
    def layers(self) -> int:
        """L."""
        return len(self.seen) - 1

    def covered(self, layers: int | None = None) -> int:
        """How many positions are seen through so many layers; all of them by default."""
        return self.seen[-1 if layers is None else layers].bit_count()

    def reach(self, layers: int | None = None) -> int:
        """The largest lag back to a position that is seen; what lies after the query does not count."""
        bits = self.seen[-1 if layers is None else layers]
        return self.query - ((bits & -bits).bit_length() - 1)

    def holes(self, layers: int | None = None) -> list[tuple[int, int]]:
        """Runs of lags [first, last] within the reach that are not seen, nearest first."""
        bits = self.seen[-1 if layers is None else layers]
        reach = self.reach(layers)
        missing = ~bits & ((1 << self.query + 1) - 1) & ~((1 << self.query - reach) - 1)
        return [(self.query - end + 1, self.query - start) for start, end in reversed([*intervals_of(missing)])]

    def hops(self) -> list[int]:
        """For each position the fewest layers through which it is seen, counted from the last one; −1 for never."""
        found = [-1] * self.context
        before = 0
        for layers, bits in enumerate(self.seen):
            for start, end in intervals_of(bits & ~before):
                found[start:end] = [layers] * (end - start)
            before = bits
        return found

    def layers_to_cover(self) -> int | None:
        """The fewest layers through which all positions are seen, of a causal pattern those up to the query."""
        wanted = (1 << (self.query + 1 if self.causal else self.context)) - 1
        return next((n for n, bits in enumerate(self.seen) if bits & wanted == wanted), None)


def receptive_field(patterns: Sequence[PiPattern], context: int, query: int | None = None) -> ReceptiveField:
    """What a query sees through a stack of layers, exactly.

    Args:
        patterns: of the layers, from the first to the last (as `config.patterns()`); heads are taken together.
        context: S, tokens of the sequence.
        query: the position that looks; the last one by default, the middle one for bidirectional patterns.

    Raises:
        ValueError: no layer, a query outside of the context, causal and bidirectional layers together, or a ring whose
            period does not divide the context.

    Example::

        field = receptive_field([PiPattern(64, 64, 8)] * 4, context=4096)
        field.reach(), field.covered(), field.layers_to_cover()
    """
    if not patterns:
        raise ValueError("patterns is empty: give the pattern of every layer.")
    if len({(pattern.causal, pattern.ring) for pattern in patterns}) > 1:
        raise ValueError("patterns must agree in causal and ring: one sequence has one geometry.")
    if context < 1:
        raise ValueError(f"context must be at least 1, got {context}.")
    if query is None:
        query = context - 1 if patterns[0].causal else context // 2
    if not 0 <= query < context:
        raise ValueError(f"query={query} must be a position of the context, 0 to {context - 1}.")
    for pattern in patterns:
        pattern.check_length(context)
    where = _Sequence(context, patterns[0].ring)
    seen = [1 << query]
    for pattern in reversed(patterns):
        seen.append(seen[-1] | _step(pattern, where, seen[-1]))
    return ReceptiveField(query, context, tuple(seen), patterns[0].causal)


@dataclass(frozen=True)
class JointCoverage:
    """The lags that some head sees in one layer, sinks aside.

    Args:
        seen: set of lags, bit l for lag l.
        lags: how many lags there are: those of the context, on a ring up to half of it.
    """

    seen: int
    lags: int

    @property
    def stretch(self) -> int:
        """Lags from 0 on that are seen without a hole: 0 … stretch − 1."""
        return (~self.seen & (self.seen + 1)).bit_length() - 1

    @property
    def reach(self) -> int:
        """The largest lag that is seen."""
        return self.seen.bit_length() - 1

    def covered(self) -> int:
        """How many lags are seen."""
        return self.seen.bit_count()

    def holes(self) -> list[tuple[int, int]]:
        """Runs of lags [first, last] within the reach that no head sees, nearest first."""
        missing = ~self.seen & ((1 << self.reach + 1) - 1)
        return [(start, end - 1) for start, end in intervals_of(missing)]


def _lags_of(pattern: PiPattern, context: int) -> int:
    """How many lags a pattern can tell apart: on a ring, a key has one distance, the shorter way round."""
    if context < 1:
        raise ValueError(f"context must be at least 1, got {context}: it is a number of tokens.")
    pattern.check_length(context)
    return context // 2 + 1 if pattern.ring else context


def _set_of(band: Band, lags: int) -> int:
    """The lags of a band of distances below `lags`, as a set: what lag 0 sees, looking the other way."""
    return _Sequence(lags, ring=False).along(1, band.within(lags).mirrored())


def joint_coverage(pattern: PiPattern, context: int) -> JointCoverage:
    """Which lags some head of one layer sees, exactly; a bidirectional pattern sees them on either side.

    Args:
        pattern: of the layer.
        context: S, tokens of the sequence.

    Raises:
        ValueError: the context is not positive, or a ring whose period does not divide it.

    >>> from pi_attention.heads import coordinated_heads
    >>> joint_coverage(coordinated_heads(window=16, skips=64, heads=4), context=2048).stretch
    272
    """
    lags = _lags_of(pattern, context)
    seen = 0
    for band in {pattern.local_band, *pattern.skip_bands()}:
        seen |= _set_of(band, lags)
    return JointCoverage(seen, lags)


def key_density(
    pattern: PiPattern, context: int, edges: Sequence[int] | None = None
) -> list[tuple[int, int, Fraction]]:
    """How many keys a lag has, in the mean over heads and over a range of lags, sinks aside.

    1 means that every head sees every lag of the range; f, that a token there is visible to a share f of the heads.
    Over all lags the densities of a pattern add up to its keys, w + m.

    Args:
        pattern: of the layer.
        context: S, tokens of the sequence.
        edges: first lags of the ranges, increasing; by default 0, w, 2w, 4w, …: the window, then octaves.

    Returns:
        (first lag, last lag, density) of each range up to the context, nearest first; densities are exact fractions.

    Raises:
        ValueError: as `joint_coverage`, or edges that do not increase from 0 on.
    """
    lags = _lags_of(pattern, context)
    bands = pattern.skip_bands()
    if edges is None:
        edges = [0, *(pattern.window << octave for octave in range(lags.bit_length()))]
    if list(edges) != sorted({0, *edges}):
        raise ValueError(f"edges must increase from 0 on, got {list(edges)}.")
    inside = [edge for edge in edges if edge < lags]
    found = []
    for first, end in itertools.pairwise([*inside, lags]):
        keys = len(bands) * _between(pattern.local_band, first, end) + sum(_between(b, first, end) for b in bands)
        found.append((first, end - 1, Fraction(keys, len(bands) * (end - first))))
    return found


def _between(band: Band, first: int, end: int) -> int:
    """How many lags of a band of distances lie in [first, end)."""
    return len(band.within(end)) - len(band.within(first)) if first else len(band.within(end))


def keys_read(pattern: PiPattern, length: int, *, heads: int, kv_heads: int | None = None) -> int:
    """Cached keys that a decoded token reads in one layer, summed over key heads: those that a head of its group sees.

    A head reads the keys of its own phase alone; grouped queries of several phases read the union of theirs.

    Args:
        pattern: of the layer; causal.
        length: tokens, the decoded one included.
        heads: H, query heads.
        kv_heads: G, key heads; as many as heads when None.

    Raises:
        ValueError: a bidirectional pattern, one of another number of heads, or key heads that do not divide the heads.
    """
    if not pattern.causal:
        raise ValueError("keys_read counts the keys of a decoded token, and only causal patterns decode.")
    pattern.check_heads(heads)
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads={kv_heads} must divide heads={heads}.")
    group = heads // kv_heads
    first_tokens = ((1 << min(pattern.sinks, length)) - 1) << length - min(pattern.sinks, length)
    counted: dict[PiPattern, int] = {}
    for first in range(0, heads, group):
        of_group = pattern.of_heads(first, first + group)
        if of_group not in counted:
            counted[of_group] = (joint_coverage(of_group, length).seen | first_tokens).bit_count()
    return sum(counted[pattern.of_heads(first, first + group)] for first in range(0, heads, group))


def paths(patterns: Sequence[PiPattern], context: int) -> list[int]:
    """For each lag the number of ways from a query to the key at that lag: a choice of head and key in every layer.

    Exact, by multiplying polynomials packed into one long number; meant for contexts up to some ten thousand. Causal
    patterns without sinks only, where the numbers are the same for all queries.
    """
    if any(not pattern.causal or pattern.sinks for pattern in patterns):
        raise ValueError("paths are counted for causal patterns without sinks, where a lag means the same everywhere.")
    choices = 1
    steps = []
    for pattern in patterns:
        counts: dict[int, int] = {}
        for skip_band in pattern.skip_bands():
            for band in (pattern.local_band, skip_band):
                for lag in band.within(context).lags():
                    counts[lag] = counts.get(lag, 0) + 1
        choices *= sum(counts.values())
        steps.append(counts)
    width = choices.bit_length()
    product = 1
    for counts in steps:
        product *= sum(count << width * lag for lag, count in counts.items())
        product &= (1 << width * context) - 1
    return [product >> width * lag & (1 << width) - 1 for lag in range(context)]
