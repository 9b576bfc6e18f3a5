"""The interactive explorer: one self-contained HTML page, set to a pattern."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from pi_attention.files import write_text
from pi_attention.pattern import PiPattern


def write_explorer(path: Path, pattern: PiPattern, *, heads: int, layers: int, context: int) -> None:
    """Write the page; its sliders start at the given pattern.

    Raises:
        ValueError: the pattern is bidirectional or has skips=None, which the page does not show.
    """
    if not pattern.causal or pattern.skips is None:
        raise ValueError(f"the explorer shows causal patterns with a number of skips, not {pattern}.")
    alike = len(set(pattern.periods)) == 1
    schedule = "one" if not pattern.per_head else "coordinated" if alike else "coprime"
    initial = {
        "window": pattern.window,
        "period": pattern.period_of(0),
        "periods": list(pattern.periods),
        "phase": pattern.phase_of(0),
        "phases": list(pattern.phases),
        "skips": pattern.skips,
        "sinks": pattern.sinks,
        "heads": heads,
        "layers": layers,
        "context": context,
        "schedule": schedule,
    }
    page = files("pi_attention").joinpath("explorer.html").read_text(encoding="utf-8")
    write_text(path, page.replace("/*INITIAL*/{}", json.dumps(initial)))
