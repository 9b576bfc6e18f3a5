"""Which keys the ranks of a sharded sequence need of one another: computed from the pattern alone, no communication.

A rank holds the contiguous positions [start, end). Its queries see keys at bounded lags, so it needs the shard moved by
each lag of the pattern, clipped to documents, minus what it holds: the halo. Every range is sent by its owner directly
to whoever needs it, so a reach over several shards is just more peers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from pi_attention.pattern import PiPattern

Range = tuple[int, int]
"""Positions [start, end)."""


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The union of ranges, as disjoint ranges in increasing order."""
    found: list[Range] = []
    for start, end in sorted(r for r in ranges if r[0] < r[1]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def without(ranges: Iterable[Range], hole: Range) -> list[Range]:
    """Disjoint ranges minus one range."""
    parts = (part for a, b in ranges for part in ((a, min(b, hole[0])), (max(a, hole[1]), b)))
    return [(a, b) for a, b in parts if a < b]


def within(ranges: Iterable[Range], bounds: Range) -> list[Range]:
    """Disjoint ranges cut to their part in one range."""
    cut = ((max(a, bounds[0]), min(b, bounds[1])) for a, b in ranges)
    return [(a, b) for a, b in cut if a < b]


@dataclass(frozen=True)
class Halo:
    """The keys of one rank: what it holds, and what it needs beside.

    Args:
        own: positions that the rank holds.
        needed: disjoint ranges of positions that it needs of others, in increasing order.
        sinks: the first of these, where they are sinks that lie before the rest; they are placed right before it.
        first, last: the extended keys stand for the positions [first, last), sinks aside; what lies between the
            needed ranges is seen by no query of the rank.
        ring: length of the ring that positions wrap around, so that `first` may be negative; 0 for a line.
    """

    own: Range
    needed: tuple[Range, ...]
    sinks: Range
    first: int
    last: int
    ring: int = 0

    @property
    def rows(self) -> int:
        """Keys that are received."""
        return sum(b - a for a, b in self.needed)

    @property
    def length(self) -> int:
        """Extended keys, sinks and gaps included."""
        return self.last - self.first + self.sinks[1] - self.sinks[0]

    def place(self, position: int) -> int:
        """Where a position stands among the extended keys."""
        if self.sinks[0] <= position < self.sinks[1]:
            return position - self.sinks[0]
        if self.ring:
            return (position - self.first) % self.ring
        return position - self.first + self.sinks[1] - self.sinks[0]


@dataclass(frozen=True)
class HaloPlan:
    """The halos of all ranks of a sequence.

    Args:
        bounds: 0, and where each rank's shard ends.
        halos: by rank.
    """

    bounds: tuple[int, ...]
    halos: tuple[Halo, ...]

    def received(self, rank: int, owner: int) -> list[Range]:
        """The ranges that `rank` needs of `owner`."""
        return within(self.halos[rank].needed, (self.bounds[owner], self.bounds[owner + 1]))

    def rows(self, rank: int, owner: int) -> int:
        """How many keys these are."""
        return sum(b - a for a, b in self.received(rank, owner))


def _moved(pattern: PiPattern, own: Range, length: int) -> Iterator[Range]:
    """The shard moved by every lag of the pattern, in a sequence of `length` tokens."""
    start, end = own
    for band in {pattern.local_band} | {pattern.skip_band(head) for head in range(len(pattern.periods))}:
        for signed in pattern.signed_bands(band, length):
            lags = signed.lags()
            if signed.stride == 1:  # neighbours: one range
                yield start - lags[-1], end - lags[0]
            else:
                yield from ((start - lag, end - lag) for lag in lags)


def _seen_by(pattern: PiPattern, own: Range, document: Range) -> list[Range]:
    """Keys that queries of one document in the shard see, sinks included."""
    start, end = max(own[0], document[0]), min(own[1], document[1])
    if start >= end:
        return []
    ranges = within([(start, end), *_moved(pattern, (start, end), document[1] - document[0])], document)
    if pattern.sinks:
        ranges.append((document[0], min(document[0] + pattern.sinks, end)))
    return merged(ranges)


def halo_plan(pattern: PiPattern, lengths: Sequence[int], documents: Sequence[int] = (0,)) -> HaloPlan:
    """The halo of every rank.

    Args:
        pattern: of the layer.
        lengths: tokens of each rank's shard, 0 allowed.
        documents: positions where packed documents start, increasing, the first one 0.

    Raises:
        ValueError: a length is negative, documents do not start at 0 or do not increase, or the pattern is a ring and
            there are several documents, or a period that does not divide the length.
    """
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths={list(lengths)} must not be negative.")
    bounds = (0, *accumulate(lengths))
    total = bounds[-1]
    starts = list(documents)
    if not starts or starts[0] != 0 or any(b <= a for a, b in pairwise(starts)) or (total and starts[-1] >= total):
        raise ValueError(f"documents={starts} must increase from 0 and stay below the length of the sequence, {total}.")
    if pattern.ring and len(starts) > 1:
        raise ValueError(f"documents={starts} cannot share a ring: set ring=False, or shard one document.")
    pattern.check_length(total)
    halos = []
    for own in pairwise(bounds):
        if own[0] == own[1]:
            halos.append(Halo(own, (), (own[0], own[0]), own[0], own[1]))
            continue
        if pattern.ring:
            halos.append(_ring_halo(pattern, own, total))
            continue
        touched = range(bisect_right(starts, own[0]) - 1, bisect_right(starts, own[1] - 1))
        ends = [*starts[1:], total]
        seen = merged(r for d in touched for r in _seen_by(pattern, own, (starts[d], ends[d])))
        halos.append(_halo(pattern, own, seen, starts[touched[0]]))
    return HaloPlan(bounds, tuple(halos))


def _halo(pattern: PiPattern, own: Range, seen: list[Range], document: int) -> Halo:
    """The halo of a rank whose queries see these keys; `document` is the start of its first query's document."""
    near = seen
    sinks = (document, document)
    if pattern.sinks:  # the sinks may lie far before everything else
        reach = _first_without_sinks(pattern, own, document)
        end = min(document + pattern.sinks, reach)
        if end > document:
            sinks = (document, end)
            near = without(seen, sinks)
    first = min(a for a, _ in near)
    return Halo(own, tuple(without(seen, own)), sinks, first, max(b for _, b in seen))


def _ring_halo(pattern: PiPattern, own: Range, total: int) -> Halo:
    """The halo on both sides of a shard of a ring.

    The extended keys are a smaller ring of whole periods, in which no query of the shard reaches around; or all of the
    ring, the shard at its end.
    """
    reach = total if pattern.reach is None else pattern.reach
    first, last = own[0] - reach, own[1] + reach
    first -= -(last - first) % math.lcm(*pattern.periods)
    if last - first >= total:
        first, last = own[1] - total, own[1]
    turns = range(-total, total + 1, total)
    seen = ((a + turn, b + turn) for a, b in _moved(pattern, own, total) for turn in turns)
    needed = without(within(merged(seen), (0, total)), own)
    return Halo(own, tuple(needed), (own[0], own[0]), first, last, ring=total)


def _first_without_sinks(pattern: PiPattern, own: Range, document: int) -> int:
    """The first position that queries of the shard see otherwise than as a sink."""
    reach = own[0] if pattern.reach is None else pattern.reach
    return max(document, own[0] - reach)
