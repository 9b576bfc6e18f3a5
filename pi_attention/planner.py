"""Choose a pattern: full coverage of a context in a number of layers ("hops") for the fewest keys a query.

The construction writes a lag as a number of mixed base. Of h hops, b are local: they reach every lag below
P₀ = b(w − 1) + 1 (b = 0 with w = 1 will do, too). The others walk along skips of period P₀, and, where heads have
periods of their own, of P₁ = P₀(a₀m + 1), P₂ = P₁(a₁m + 1), …: aᵢ hops along period Pᵢ write the i-th digit, 0 to aᵢm.
All lags below P₀·∏(aᵢm + 1) are reached; one more hop along the last period in place of a local one adds
(b − 1)(w − 1) + 1. With one period and h = 2 the best is w = π = m + 1 ≈ √S; a further period multiplies what is
covered instead of adding to it.

Another objective is one layer: `longest_stretch` gives the heads that see together the most lags without a hole.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from pi_attention.heads import coordinated_heads
from pi_attention.pattern import PiPattern, need_int
from pi_attention.receptive_field import joint_coverage, receptive_field
from pi_attention.units import counted


@dataclass(frozen=True)
class Plan:
    """A pattern, and the layers through which it covers the context.

    Args:
        pattern: of every layer.
        context: S, tokens.
        hops: layers through which every earlier token is seen.
    """

    pattern: PiPattern
    context: int
    hops: int

    @property
    def keys(self) -> int:
        """Keys of a query, sinks aside: w + m."""
        return self.pattern.window + (self.pattern.skips or 0)


def _digits(hops: int, heads: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Local hops b, and the hops along each period: every balanced way to spend the hops."""
    yield hops, ()
    yield hops, (0,)
    for local in range(hops):
        skips = hops - local
        for periods in range(1, min(heads, skips) + 1):
            each, more = divmod(skips, periods)
            yield local, tuple(each + (digit < more) for digit in range(periods))


def _covered(window: int, local: int, digits: tuple[int, ...], skips: int) -> int:
    """Lags from 0 on that are reached without a hole."""
    base = local * (window - 1) + 1
    if not digits or not skips:
        return base
    for along in digits:
        base *= along * skips + 1
    return base + (local - 1) * (window - 1) + 1 if local else base


def _fewest_skips(window: int, local: int, digits: tuple[int, ...], context: int, most: int) -> int | None:
    """The smallest m ≤ most with which the context is covered."""
    if most < 0 or _covered(window, local, digits, most) < context:
        return None
    return bisect.bisect_left(range(most), context, key=lambda skips: _covered(window, local, digits, skips))


def _periods(base: int, digits: tuple[int, ...], skips: int) -> list[int]:
    found = []
    for along in digits:
        found.append(base)
        base *= along * skips + 1
    return found


def fewest_keys(context: int, hops: int, *, heads: int = 1, sinks: int = 0) -> Plan:
    """The pattern of fewest keys w + m that covers the context in so many layers.

    Args:
        context: S, tokens.
        hops: layers, at least 1.
        heads: query heads; with more than one they may get different periods (spread evenly over the heads).
        sinks: first tokens that every query sees, beside the w + m keys.

    Raises:
        ValueError: an argument is not positive.
    """
    for name, value in (("context", context), ("hops", hops), ("heads", heads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    best = context, context, 0, [1]  # keys, window, skips, periods: a window over everything
    if hops == 1:  # nothing else covers everything at once (but for a key, with several periods)
        return Plan(PiPattern(context, context, 0, sinks=sinks), context, hops)
    for local, digits in _digits(hops, heads):
        for window in itertools.count(1):
            if window >= best[0] or (window > 1 and not local):  # without a local hop the digits begin at period 1
                break
            skips = _fewest_skips(window, local, digits, context, best[0] - window - 1)
            if skips is not None:
                best = window + skips, window, skips, _periods(local * (window - 1) + 1, digits, skips)
    _, window, skips, periods = best
    period: int | tuple[int, ...]
    if not skips:
        period = window
    elif len(periods) == 1:
        period = periods[0]
    else:
        period = tuple(periods[head % len(periods)] for head in range(heads))
    return Plan(PiPattern(window, period, skips, sinks=sinks), context, hops)


def longest_stretch(
    budget: int, heads: int, *, least_window: int = 16, context: int | None = None, sinks: int = 0
) -> Plan:
    """The coordinated heads that see together, in one layer, the longest stretch of lags without a hole.

    H heads of w + m keys see w + H·m lags at most, since all of them see the window. Heads of period H with the phases
    0 … H − 1 see so many, without a hole; so the window is the least, and the other keys are skips. Where that is more
    than the context, the window is the widest with which the stretch still spans it.

    Args:
        budget: most keys w + m of a query, in every head.
        heads: H, query heads.
        least_window: fewest neighbours w that every head keeps.
        context: S, tokens; a longer stretch would be of no use. None: as long as can be.
        sinks: first tokens that every query sees, beside the budget.

    Returns:
        A plan of one hop, whose `context` is the stretch: the lags 0 … context − 1 are seen.

    Raises:
        TypeError, ValueError: an argument is not a positive int, or the least window is more than the budget.

    >>> longest_stretch(budget=80, heads=4).context
    272
    """
    need_int("budget", budget, 1, "a query sees itself at least")
    need_int("heads", heads, 1, "one phase is made for each query head")
    need_int("least_window", least_window, 1, "the window counts the token itself, so 1 is the smallest")
    if least_window > budget:
        raise ValueError(
            f"least_window={least_window} is more than budget={budget} keys a query: raise the budget, or keep fewer "
            "neighbours."
        )
    window = budget if heads == 1 else least_window
    skips = budget - window
    if context is not None:
        need_int("context", context, 1, "a stretch spans at least the token itself")
        if heads > 1:  # the widest window with w + H·(budget − w) ≥ S
            window = max(window, (heads * budget - context) // (heads - 1))
        window = min(window, budget, context)
        skips = min(budget - window, -((window - context) // heads))
    several = coordinated_heads(window, skips, heads, heads, sinks=sinks)
    pattern = several if skips else PiPattern(window, 1, 0, sinks=sinks)
    stretch = joint_coverage(pattern, window + heads * skips).stretch
    return Plan(pattern, stretch if context is None else min(stretch, context), 1)


def plan(
    context: int, layers: int, *, heads: int = 1, budget: int | None = None, hops: int | None = None, sinks: int = 0
) -> Plan:
    """The pattern to use: for the asked hops the fewest keys, or within the budget the fewest hops.

    Args:
        context: S, tokens that the last layer must see.
        layers: of the model; hops are at most that many.
        heads: query heads, which may get different periods.
        budget: most keys w + m of a query; None where hops are given.
        hops: layers through which every token is seen; the fewest that the budget allows when None.
        sinks: first tokens that every query sees, beside the budget.

    Raises:
        ValueError: neither budget nor hops is given, or they cannot be met together.
    """
    if budget is None and hops is None:
        raise ValueError("give a budget of keys a query, or the hops in which the context must be covered.")
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}.")
    if hops is not None and not 1 <= hops <= layers:
        raise ValueError(f"hops={hops} must lie between 1 and the number of layers, {layers}.")
    for number in range(1, layers + 1) if hops is None else [hops]:
        found = fewest_keys(context, number, heads=heads, sinks=sinks)
        if budget is None or found.keys <= budget:
            field = receptive_field([found.pattern] * number, context)
            assert field.covered() == context, f"{found} does not cover the context: a bug of the planner"
            return found
    raise ValueError(
        f"budget={budget} keys a query do not cover a context of {context:,} in {counted(number, 'layer')}, "
        f"which takes {found.keys:,}: raise the budget"
        f"{'' if hops is None else ' or the hops'}"
        f"{', or let heads have periods of their own (--head-schedule)' if heads == 1 else ''}."
    )
