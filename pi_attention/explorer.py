"""The interactive explorer: one self-contained HTML page, set to the patterns of a stack of layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from pi_attention.describe import is_dense
from pi_attention.files import write_text
from pi_attention.pattern import PiPattern
from pi_attention.stack import stacked

SKIPS, WINDOW = 8, 64
"""Where the sliders start if all layers that have skips have all of them, and if all layers are dense."""


def write_explorer(path: Path, patterns: Sequence[PiPattern], *, heads: int, context: int) -> None:
    """Write the page. Its sliders start at the first pattern with skips, or else at the largest window.

    Args:
        path: of the page.
        patterns: of the layers, from the first to the last (as `config.patterns()`).
        heads: of a layer.
        context: tokens of the sequence.

    Raises:
        ValueError: there is no layer, or a pattern is bidirectional, which the page does not show.
    """
    if not patterns or not all(pattern.causal for pattern in patterns):
        raise ValueError(f"the explorer shows causal patterns, one a layer, not {list(dict.fromkeys(patterns))}.")
    pattern = _of_the_sliders(patterns)
    alike = len(set(pattern.periods)) == 1
    schedule = "one" if not pattern.per_head else "coordinated" if alike else "coprime"
    initial = _fields(pattern) | {
        "period": pattern.period_of(0),
        "phase": pattern.phase_of(0),
        "heads": heads,
        "layers": len(patterns),
        "context": context,
        "schedule": schedule,
        "kinds": _unrepeated([_kind(layer, pattern) for layer in patterns]),
    }
    page = files("pi_attention").joinpath("explorer.html").read_text(encoding="utf-8")
    write_text(path, page.replace("/*INITIAL*/{}", json.dumps(initial)))


def _of_the_sliders(patterns: Sequence[PiPattern]) -> PiPattern:
    """The first pattern with a number of skips, or with all of them, or else the largest window that is not dense."""
    for pattern in patterns:
        if pattern.skips:
            return pattern
    for pattern in patterns:
        if pattern.skips is None:
            return replace(pattern, skips=SKIPS)
    windows = [pattern for pattern in patterns if not is_dense(pattern)]
    return max(windows, key=lambda pattern: pattern.window, default=PiPattern(WINDOW, 1, 0))


def _kind(layer: PiPattern, pattern: PiPattern) -> str | dict[str, Any]:
    """What a layer has beside the pattern of the sliders: its `Kind`, or its own fields."""
    kinds = ["pi", "local", "dense"] + (["all-skips"] if pattern.skips else [])
    return next((kind for kind in kinds if stacked([kind], pattern, 1) == [layer]), _fields(layer))


def _fields(pattern: PiPattern) -> dict[str, Any]:
    """A pattern as the rules of the page take it."""
    single = {"window": pattern.window, "skips": pattern.skips, "sinks": pattern.sinks}
    return single | {"periods": list(pattern.periods), "phases": list(pattern.phases)}


def _unrepeated(kinds: list[Any]) -> list[Any]:
    """The shortest list whose repetition gives these."""
    counts = (n for n in range(1, len(kinds)) if len(kinds) % n == 0 and kinds[:n] * (len(kinds) // n) == kinds)
    return kinds[: next(counts, len(kinds))]
