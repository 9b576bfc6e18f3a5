"""Which keys a query sees: one immutable description, from which masks, kernels, caches and costs are derived.

A query at position q sees the keys of two disjoint bands of distances (arXiv 2511.10696, section 3):

* the ring-local band, distances 0 … window − 1;
* the periodic skip band, distances c·period + phase for `skips` consecutive c, from the first that lies beyond the
  window. Heads of one period and different phases share the distance: together they see every lag, each once.

Standard library only. Predicates use operators only, so the same code serves ints and tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

MOST_TOKENS = 2**62
"""Of any field and of the reach: sums of two of them still fit into 64 bits."""


@dataclass(frozen=True)
class Band:
    """The lags `stride · c + phase` for first ≤ c < last (`last=None`: without end).

    A band of stride 1 is a run of neighbours; a band of stride π is a run of neighbours in the sequence taken in
    residue order, i.e. viewed as π interleaved sequences: the keys of residue ρ are the rows of residue ρ − phase.
    Every implementation works on that second view.
    """

    stride: int
    first: int
    last: int | None
    phase: int = 0

    def contains(self, lag: Any) -> Any:
        """True where `lag` (int or integer tensor) belongs to the band."""
        lag = lag - self.phase
        inside = (lag % self.stride == 0) & (lag >= self.first * self.stride)
        return inside if self.last is None else inside & (lag < self.last * self.stride)

    def within(self, length: int) -> Band:
        """The part of the band with |lag| < length."""
        most = (length - 1 - self.phase) // self.stride
        last = most + 1 if self.last is None else min(self.last, most + 1)
        first = max(self.first, -((length - 1 + self.phase) // self.stride))
        return Band(self.stride, first, max(first, last), self.phase)

    def mirrored(self) -> Band:
        """The band of the opposite lags; only for a bounded band."""
        if self.last is None:
            raise ValueError("a band without end has no mirror image: bound it with within(length) first.")
        return Band(self.stride, 1 - self.last, 1 - self.first, -self.phase)

    def lags(self) -> range:
        """The lags in increasing order; only for a bounded band."""
        if self.last is None:
            raise ValueError("a band without end has no list of lags: bound it with within(length) first.")
        return range(self.first * self.stride + self.phase, self.last * self.stride + self.phase, self.stride)

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
            (plus the phase) that lies beyond the window. 0 is ring-local attention. None is every multiple back to the
            start: cost S²/period, and a decoding cache that grows with the context.
        causal: only keys at or before the query.
        ring: positions wrap modulo the length, and the distance of a key is the shorter way round; bidirectional only,
            and every period must divide the length.
        sinks: the first `sinks` keys of the query's segment always belong to the local band (causal only).
        phase: offset of the skip lags, 0 ≤ phase < period; an int, or one int per query head. Heads of period p with
            the phases 0 … p − 1 see together every lag up to the reach (see `coordinated_heads`).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or contradicts another; the message names the remedy.
    """

    window: int
    period: int | tuple[int, ...]
    skips: int | None
    causal: bool = True
    ring: bool = False
    sinks: int = 0
    phase: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        need_int("window", self.window, 1, "the window counts the token itself, so 1 is the smallest")
        self._need_ints_of_heads("period", 1, "a distance of at least one token")
        self._need_ints_of_heads("phase", 0, "an offset of at least 0 tokens")
        if isinstance(self.period, tuple) and isinstance(self.phase, tuple) and len(self.period) != len(self.phase):
            raise ValueError(
                f"phase has {len(self.phase)} entries and period has {len(self.period)}: give each one int for all "
                "heads, or one int per query head."
            )
        for head, (period, phase) in enumerate(zip(self.periods, self.phases, strict=True)):
            if phase >= period:
                name = f"phase[{head}]" if isinstance(self.phase, tuple) else "phase"
                raise ValueError(
                    f"{name}={phase} must be smaller than the period of its head, {period}: take it modulo the period."
                )
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
        largest = {"window": self.window, "period": max(self.periods), "sinks": self.sinks, "reach": self.reach or 0}
        for name, value in largest.items():
            if value > MOST_TOKENS:
                raise ValueError(
                    f"{name}={value} is beyond 2**62 tokens, the most that positions can count: take less "
                    f"{'skips or a smaller period' if name == 'reach' else 'of it; a window of 2**40 is dense'}."
                )
        if self.sinks and not self.causal:
            raise ValueError(f"sinks={self.sinks} needs causal=True: sinks are the first keys before a query.")

    def _need_ints_of_heads(self, name: str, least: int, what: str) -> None:
        """Check a field that holds one int, or one int per query head; the latter becomes a tuple."""
        value = getattr(self, name)
        if not isinstance(value, list | tuple):
            need_int(name, value, least, f"give {what}, or one per query head as a tuple")
            return
        if not value:
            raise ValueError(f"{name} must not be an empty sequence: give one int, or one int per query head.")
        for head, of_head in enumerate(value):
            need_int(f"{name}[{head}]", of_head, least, f"every head needs {what}")
        object.__setattr__(self, name, tuple(value))

    @property
    def per_head(self) -> bool:
        """Whether the pattern is spelled head by head, so that it fits one number of heads only."""
        return isinstance(self.period, tuple) or isinstance(self.phase, tuple)

    @property
    def periods(self) -> tuple[int, ...]:
        """The periods, one per head, or a single one where all heads share period and phase."""
        if isinstance(self.period, tuple):
            return self.period
        return (self.period,) * (len(self.phase) if isinstance(self.phase, tuple) else 1)

    @property
    def phases(self) -> tuple[int, ...]:
        """The phases, as many as `periods`."""
        if isinstance(self.phase, tuple):
            return self.phase
        return (self.phase,) * (len(self.period) if isinstance(self.period, tuple) else 1)

    def period_of(self, head: int) -> int:
        """The period of query head `head`."""
        return self.period[head] if isinstance(self.period, tuple) else self.period

    def phase_of(self, head: int) -> int:
        """The phase of query head `head`."""
        return self.phase[head] if isinstance(self.phase, tuple) else self.phase

    def of_heads(self, first: int, last: int) -> PiPattern:
        """The pattern of the query heads [first, last) alone, as a rank of tensor parallelism holds them."""
        if not self.per_head:
            return self
        if not 0 <= first < last <= len(self.periods):
            raise ValueError(f"heads {first} to {last} are not among the {len(self.periods)} of the pattern.")
        return replace(self, period=self.periods[first:last], phase=self.phases[first:last])

    @property
    def local_band(self) -> Band:
        """The distances of the ring-local band."""
        return Band(1, 0, self.window)

    def skip_band(self, head: int = 0) -> Band:
        """The distances of the periodic skip band of query head `head`."""
        period, phase = self.period_of(head), self.phase_of(head)
        first = -((phase - self.window) // period)  # ⌈(w − φ)/π⌉: the first lag that the window leaves out
        return Band(period, first, None if self.skips is None else first + self.skips, phase)

    def skip_bands(self) -> tuple[Band, ...]:
        """The skip band of every head, or a single one that all heads share."""
        return tuple(self.skip_band(head) for head in range(len(self.periods)))

    @property
    def reach(self) -> int | None:
        """Largest lag that any head sees, in tokens (sinks aside); None when `skips=None` makes it unbounded.

        It is the number of past tokens that a decoding cache keeps and the halo of a sequence shard.
        """
        if self.skips is None:
            return None
        if self.skips == 0:
            return self.window - 1
        return max(self.window - 1, *(band.lags()[-1] for band in self.skip_bands()))

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
            last = min(last, (length // 2 - band.phase) // band.stride + 1)
            mirror_last = min(mirror_last, ((length - 1) // 2 - band.phase) // band.stride + 1)
        if band.first == 0 and not band.phase:
            return (Band(band.stride, 1 - mirror_last, last),)
        mirror = Band(band.stride, 1 - mirror_last, 1 - band.first, -band.phase)
        both = (mirror, Band(band.stride, band.first, last, band.phase))
        return tuple(side for side in both if len(side))

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
        """Positions of the local keys and of the skip keys that the query position sees among [start, length).

        >>> PiPattern(window=2, period=3, skips=2).keys(query=9, length=10)
        ([8, 9], [3, 6])
        """
        positions = range(start, length)
        local = [k for k in positions if self.sees_local(query, k, length=length, start=start)]
        skip = [k for k in positions if self.sees_skip(query, k, head=head, length=length, start=start)]
        return local, skip

    def check_heads(self, num_heads: int) -> None:
        """Raise ValueError unless period and phase are one for all, or one for each of `num_heads` query heads."""
        for name in ("period", "phase"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != num_heads:
                raise ValueError(
                    f"{name} has {len(value)} entries but there are {num_heads} query heads: "
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

    def to_dict(self) -> dict[str, Any]:
        """The pattern as JSON: its fields by name, a list where there is one int per head."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> PiPattern:
        """Inverse of `to_dict`; fields that have a default may be left out.

        Raises:
            TypeError, ValueError: a field is unknown, is missing, or has a wrong value.
        """
        if not isinstance(settings, Mapping):
            raise TypeError(f"a pattern must be a dict of its fields, got {settings!r}: see to_dict.")
        known = [field.name for field in fields(cls)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no field of a pattern: use {', '.join(known)}.")
        missing = [name for name in ("window", "period", "skips") if name not in settings]
        if missing:
            raise ValueError(f"the pattern {dict(settings)} has no {missing[0]!r}: give window, period and skips.")
        return cls(**settings)

    def to_ints(self) -> list[int]:
        """The pattern as the integers that the schema of a registered operator can carry."""
        skips = -1 if self.skips is None else self.skips
        return [self.window, skips, int(self.causal), int(self.ring), self.sinks, *self.periods, *self.phases]

    @staticmethod
    def from_ints(code: Sequence[int]) -> PiPattern:
        """Inverse of `to_ints`, but for the spelling: what all heads share may come back once a head."""
        return _from_ints(tuple(code))


@lru_cache(maxsize=256)
def _from_ints(code: tuple[int, ...]) -> PiPattern:
    window, skips, causal, ring, sinks, *of_heads = code
    heads = len(of_heads) // 2
    period, phase = (tuple(x) if heads > 1 else x[0] for x in (of_heads[:heads], of_heads[heads:]))
    return PiPattern(window, period, None if skips < 0 else skips, bool(causal), bool(ring), sinks, phase)


def need_pattern(pattern: object) -> None:
    """Raise TypeError unless it is a `PiPattern`."""
    if not isinstance(pattern, PiPattern):
        raise TypeError(f"pattern must be a PiPattern, got {type(pattern).__name__}: PiPattern(window, period, skips).")
