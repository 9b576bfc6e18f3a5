"""Which keys a query sees: one immutable description, from which masks, kernels, caches and costs are derived.

A query at position q sees the keys of two disjoint bands of distances (arXiv 2511.10696, section 3):

* the ring-local band, distances 0 … window − 1;
* the periodic skip band, distances c·period for `skips` consecutive c, from the first multiple beyond the window.

Standard library only. Predicates use operators only, so the same code serves ints and tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Band:
    """The lags `stride · c` for first ≤ c < last (`last=None`: without end).

    A band of stride 1 is a run of neighbours; a band of stride π is a run of neighbours in the sequence taken in
    residue order, i.e. viewed as π interleaved sequences. Every implementation works on that second view.
    """

    stride: int
    first: int
    last: int | None

    def contains(self, lag: Any) -> Any:
        """True where `lag` (int or integer tensor) belongs to the band."""
        inside = (lag % self.stride == 0) & (lag >= self.first * self.stride)
        return inside if self.last is None else inside & (lag < self.last * self.stride)

    def within(self, length: int) -> Band:
        """The part of the band with |lag| < length."""
        most = (length - 1) // self.stride
        last = most + 1 if self.last is None else min(self.last, most + 1)
        first = max(self.first, -most)
        return Band(self.stride, first, max(first, last))

    def mirrored(self) -> Band:
        """The band of the opposite lags; only for a bounded band."""
        if self.last is None:
            raise ValueError("a band without end has no mirror image: bound it with within(length) first.")
        return Band(self.stride, 1 - self.last, 1 - self.first)

    def lags(self) -> range:
        """The lags in increasing order; only for a bounded band."""
        if self.last is None:
            raise ValueError("a band without end has no list of lags: bound it with within(length) first.")
        return range(self.first * self.stride, self.last * self.stride, self.stride)

    def __len__(self) -> int:
        return len(self.lags())


def need_int(name: str, value: object, least: int, remedy: str) -> None:
    """Raise TypeError or ValueError, with the remedy, unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}: {remedy}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}: {remedy}.")


@dataclass(frozen=True)
class PiPattern:
    """The keys that a query of π-Attention sees (arXiv 2511.10696).

    Key j is at position j of the S keys; query i of T is at position S − T + i, so that a chunk of queries can be
    appended to cached keys. The lag is query position − key position.

    Args:
        window: keys of the ring-local band on each side, the token itself counted: |lag| < window.
        period: distance between two skip keys; an int, or one int per query head (head-level coordination).
        skips: skip keys of a query (on each side when bidirectional), the first at the first multiple of the period
            that lies beyond the window. 0 is ring-local attention. None is every multiple back to the start: cost
            S²/period, and a decoding cache that grows with the context.
        causal: only keys at or before the query.
        ring: positions wrap modulo the length; bidirectional only, and every period must divide the length.
        sinks: the first `sinks` keys of the query's segment always belong to the local band (causal only).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or contradicts another; the message names the remedy.
    """

    window: int
    period: int | tuple[int, ...]
    skips: int | None
    causal: bool = True
    ring: bool = False
    sinks: int = 0

    def __post_init__(self) -> None:
        need_int("window", self.window, 1, "the window counts the token itself, so 1 is the smallest")
        if isinstance(self.period, list | tuple):
            if not self.period:
                raise ValueError("period must not be an empty sequence: give one int, or one int per query head.")
            for head, period in enumerate(self.period):
                need_int(f"period[{head}]", period, 1, "every head needs a distance of at least one token")
            object.__setattr__(self, "period", tuple(self.period))
        else:
            need_int("period", self.period, 1, "give a distance in tokens, or one per query head as a tuple")
        if self.skips is not None:
            need_int("skips", self.skips, 0, "0 is ring-local attention, None every multiple of the period")
        need_int("sinks", self.sinks, 0, "0 means no attention sinks")
        for name in ("causal", "ring"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if self.ring and self.causal:
            raise ValueError(
                "ring=True needs causal=False: on a ring there is no past. Set causal=False or ring=False."
            )
        if self.sinks and not self.causal:
            raise ValueError(f"sinks={self.sinks} needs causal=True: sinks are the first keys before a query.")

    @property
    def periods(self) -> tuple[int, ...]:
        """The periods, one per head, or a single one that all heads share."""
        return self.period if isinstance(self.period, tuple) else (self.period,)

    def period_of(self, head: int) -> int:
        """The period of query head `head`."""
        return self.periods[head] if isinstance(self.period, tuple) else self.period

    @property
    def local_band(self) -> Band:
        """The distances of the ring-local band."""
        return Band(1, 0, self.window)

    def skip_band(self, head: int = 0) -> Band:
        """The distances of the periodic skip band of query head `head`."""
        period = self.period_of(head)
        first = max(1, -(-self.window // period))
        return Band(period, first, None if self.skips is None else first + self.skips)

    @property
    def reach(self) -> int | None:
        """Largest lag that any head sees, in tokens (sinks aside); None when `skips=None` makes it unbounded.

        It is the number of past tokens that a decoding cache keeps and the halo of a sequence shard.
        """
        if self.skips is None:
            return None
        if self.skips == 0:
            return self.window - 1
        return max(self.window - 1, *(self.skip_band(h).lags()[-1] for h in range(len(self.periods))))

    def signed_bands(self, band: Band, length: int) -> tuple[Band, ...]:
        """The disjoint bands of signed lags that `band`, a band of distances, stands for at S = length.

        Causal: the band itself. Bidirectional: both signs, joined into one band where they touch. Ring: the same,
        with each lag modulo the length taken once, by its smaller distance.
        """
        band = band.within(length)
        assert band.last is not None
        if self.causal:
            return (band,) if len(band) else ()
        last, mirror_last = band.last, band.last
        if self.ring:
            last = min(last, length // 2 // band.stride + 1)
            mirror_last = min(mirror_last, (length - 1) // 2 // band.stride + 1)
        if band.first == 0:
            return (Band(band.stride, 1 - mirror_last, last),)
        both = (Band(band.stride, 1 - mirror_last, 1 - band.first), Band(band.stride, band.first, last))
        return tuple(side for side in both if side.first < (side.last or 0))

    def distance(self, query: Any, key: Any, length: int | None = None) -> Any:
        """Distance from key to query position: the lag, its absolute value (bidirectional), or that on the ring.

        Negative only for a causal pattern and a future key. `length` is needed when `ring=True`.
        """
        lag = query - key
        if self.causal:
            return lag
        if not self.ring:
            return abs(lag)
        if length is None:
            raise ValueError("a ring pattern needs length=S to know where positions wrap.")
        lag = lag % length
        return lag - (2 * lag > length) * (2 * lag - length)

    def sees_local(self, query: Any, key: Any, *, length: int | None = None, start: Any = 0) -> Any:
        """True where the query position sees the key position in the local band (ints or integer tensors).

        `start` is the first position of the query's segment, from which sinks are counted.
        """
        near = self.local_band.contains(self.distance(query, key, length))
        if not self.sinks:
            return near
        return near | ((key - start < self.sinks) & (key >= start) & (key <= query))

    def sees_skip(self, query: Any, key: Any, *, head: int = 0, length: int | None = None, start: Any = 0) -> Any:
        """True where the query position sees the key position in the skip band of `head` (ints or integer tensors)."""
        far = self.skip_band(head).contains(self.distance(query, key, length))
        return far & (key - start >= self.sinks) if self.sinks else far

    def keys(self, query: int, length: int, *, head: int = 0, start: int = 0) -> tuple[list[int], list[int]]:
        """Positions of the local keys and of the skip keys that the query position sees among [start, length)."""
        positions = range(start, length)
        local = [k for k in positions if self.sees_local(query, k, length=length, start=start)]
        skip = [k for k in positions if self.sees_skip(query, k, head=head, length=length, start=start)]
        return local, skip

    def check_heads(self, num_heads: int) -> None:
        """Raise ValueError unless there is one period for all, or one for each of `num_heads` query heads."""
        if isinstance(self.period, tuple) and len(self.period) != num_heads:
            raise ValueError(
                f"period has {len(self.period)} entries but there are {num_heads} query heads: "
                "give one int for all heads, or one int per query head."
            )

    def check_length(self, length: int) -> None:
        """Raise ValueError when a ring pattern has a period that does not divide the length S."""
        if self.ring:
            for period in self.periods:
                if length % period:
                    raise ValueError(
                        f"ring=True needs every period to divide the length, but {length} % {period} != 0: "
                        "pad the sequence to a multiple of the period, or set ring=False."
                    )


def need_pattern(pattern: object) -> None:
    """Raise TypeError unless it is a `PiPattern`."""
    if not isinstance(pattern, PiPattern):
        raise TypeError(f"pattern must be a PiPattern, got {type(pattern).__name__}: PiPattern(window, period, skips).")


def geometric_periods(first: int, last: int, heads: int) -> tuple[int, ...]:
    """Periods from `first` to `last` in geometric progression, one per head: small periods see near, large ones far.

    >>> geometric_periods(16, 128, heads=4)
    (16, 32, 64, 128)
    """
    need_int("first", first, 1, "a period is a distance in tokens")
    need_int("last", last, first, "the last period must not be smaller than the first")
    need_int("heads", heads, 1, "one period is made for each query head")
    ratio = (last / first) ** (1 / max(1, heads - 1))
    return tuple(round(first * ratio**head) for head in range(heads))


def coprime_periods(base: int, heads: int) -> tuple[int, ...]:
    """The `heads` smallest periods from `base` upwards that are pairwise coprime.

    Two heads with coprime periods share a lag only at multiples of the product, so together they cover the most lags.

    >>> coprime_periods(64, heads=4)
    (64, 65, 67, 69)
    """
    need_int("base", base, 1, "a period is a distance in tokens")
    need_int("heads", heads, 1, "one period is made for each query head")
    return tuple(period for period, _ in zip(_coprime_from(base), range(heads), strict=False))


def _coprime_from(base: int) -> Iterator[int]:
    product = 1
    period = base
    while True:
        if math.gcd(period, product) == 1:
            product *= period
            yield period
        period += 1
