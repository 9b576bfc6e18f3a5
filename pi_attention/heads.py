"""Periods and phases of several heads: how they divide the distance between them.

The paper (arXiv 2511.10696, section 3) coordinates the periods of the heads, so that their skips complement each other.
Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pi_attention.pattern import PiPattern, need_int


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


def coordinated_heads(
    window: int,
    skips: int | None,
    heads: int,
    period: int | Sequence[int] | None = None,
    *,
    sinks: int = 0,
) -> PiPattern:
    """Heads that share the distance: one period, and phases spread evenly over the heads.

    With as many phases as the period the heads together see the lags 0 … window + skips · period − 1 without a hole,
    and each lag beyond the window is seen by one phase. There are as many phases as divide the heads, at most `period`.

    Args:
        window: keys of the ring-local band, of every head.
        skips: skip keys of every head; None for every one back to the start.
        heads: query heads.
        period: distance between two skip keys of a head; the largest divisor of the heads up to 4 when None (all the
            heads, if they have none). Several periods are several scales: the heads are split evenly over them.
        sinks: as in `PiPattern`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or the periods do not divide the heads.

    >>> coordinated_heads(window=16, skips=64, heads=4)
    PiPattern(window=16, period=4, skips=64, causal=True, ring=False, sinks=0, phase=(0, 1, 2, 3))
    """
    need_int("heads", heads, 1, "one phase is made for each query head")
    if period is None:
        period = next((n for n in (4, 3, 2) if heads % n == 0), heads)
    if not isinstance(period, int | Sequence) or isinstance(period, str):
        raise TypeError(f"period must be an int or several ints, got {period!r}: give one for each scale.")
    scales = [period] if isinstance(period, int) else list(period)
    if not scales or heads % len(scales):
        raise ValueError(
            f"period={period!r} has {len(scales)} entries, which must divide heads={heads}: as many heads look at each "
            "scale."
        )
    for scale in scales:
        need_int("period", scale, 1, "a period is a distance in tokens")
    share = heads // len(scales)
    periods, phases = [], []
    for scale in scales:
        count = max(n for n in range(1, min(scale, share) + 1) if share % n == 0)
        periods += [scale] * share
        phases += [number % count * scale // count for number in range(share)]
    return PiPattern(window, scales[0] if len(scales) == 1 else tuple(periods), skips, sinks=sinks, phase=tuple(phases))


def pattern_for(heads: int, settings: Mapping[str, Any]) -> PiPattern:
    """The pattern of a model from fields as `to_dict` has them; without a period, that of coordinated heads.

    Without skips it is a window, which has no phases.

    Args:
        heads: query heads of the model.
        settings: fields of `PiPattern`, of which `period` and `phase` may be None.

    Raises:
        TypeError, ValueError: a field is of the wrong kind or contradicts another.

    >>> pattern_for(4, {"window": 16, "skips": 64, "period": None, "phase": None})
    PiPattern(window=16, period=4, skips=64, causal=True, ring=False, sinks=0, phase=(0, 1, 2, 3))
    """
    given = {name: x for name, x in settings.items() if x is not None or name not in ("period", "phase")}
    if "period" in given:
        return PiPattern.from_dict(given)
    if "phase" in given:
        raise ValueError(f"phase={given['phase']!r} needs a period: give one, or neither for coordinated heads.")
    if given["skips"] == 0:
        return PiPattern.from_dict(given | {"period": 1})
    alike = coordinated_heads(1, 1, heads)
    return PiPattern.from_dict(given | {"period": alike.period, "phase": alike.phase})


def dilated_heads(window: int, skips: int, heads: int, context: int, *, sinks: int = 0) -> PiPattern:
    """Heads whose stride grows from 1 geometrically, so that the last of several sees about the whole context.

    Args:
        window: keys of the ring-local band, of every head.
        skips: skip keys of every head.
        heads: query heads.
        context: tokens that the head of the largest stride should see.
        sinks: as in `PiPattern`.

    >>> dilated_heads(window=16, skips=64, heads=4, context=2048).period
    (1, 3, 9, 25)
    """
    need_int("context", context, 1, "the strides are chosen for a length")
    need_int("window", window, 1, "the window counts the token itself, so 1 is the smallest")
    need_int("skips", skips, 0, "0 is ring-local attention")
    last = max(1, (context - 1) // max(1, window + skips - 1))
    return PiPattern(window, geometric_periods(1, last, heads), skips, sinks=sinks)
