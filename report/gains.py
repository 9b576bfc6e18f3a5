"""Pictures of docs/results.md and its data pages, from the rows of the experiments; `python -m report` draws them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.intervals import interval
from experiments.experiment import Result, Settings
from experiments.registry import EXPERIMENTS
from experiments.variants import BASELINE, COORDINATED_HEADS, DILATED_HEADS
from pi_attention import plots
from report.cells import grouped, measured_cells, of_seeds, percent_above
from report.language_models import is_too_early

Lines = dict[str, list[tuple[float, float]]]
"""Points by label."""

COMPARED: dict[str, tuple[str, Settings]] = {
    "C, 2,048 tokens, 16 M of training": ("language_modelling", {"corpus": "linux", "context": 2048}),
    "C, 2,048 tokens, 131 M of training": ("language_modelling_long", {"corpus": "linux"}),
    "C, 16,384 tokens": ("language_modelling", {"corpus": "linux", "context": 16384}),
    "prose, 8,192 tokens": ("language_modelling", {"corpus": "prose"}),
    "ListOps": ("listops", {}),
    "film reviews as bytes": ("lra", {"task": "text"}),
    "film reviews, mean of tokens": ("lra_pooled", {"task": "text"}),
    "images as pixels": ("lra", {"task": "image"}),
    "emoji": ("image_text", {"images": "emoji"}),
    "Open Clip Art": ("image_text", {"images": "openclipart"}),
    "glucose": ("series", {"task": "glucose"}),
    "flights": ("series", {"task": "flights"}),
    "S&P 500": ("series", {"task": "S&P 500 volatility"}),
    "WTI": ("series", {"task": "WTI volatility"}),
}
"""Experiments whose rows have several seeds, by label: name and settings of the cells."""


def rows_of(name: str, chosen: Settings) -> dict[str, list[dict[str, Any]]]:
    """The rows of an experiment's cells with the chosen settings, at the best rate, by variant."""
    cells = measured_cells(EXPERIMENTS[name])
    return {cell["variant"]: rows for cell, rows in cells if chosen.items() <= cell.items()}


def gains(
    variants: Iterable[str] = ("pi", "pi, coprime heads", DILATED_HEADS, COORDINATED_HEADS),
) -> dict[str, dict[str, tuple[float, float]]]:
    """Percent by which variants are better than the baseline, by task: mean over paired seeds and half-width.

    A † marks training that is too short to rank patterns.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for label, (name, chosen) in COMPARED.items():
        sign = 1 if EXPERIMENTS[name].better == "higher" else -1
        rows = rows_of(name, chosen)
        if name.startswith("language_modelling"):
            group = next(members for common, members in grouped(name) if chosen.items() <= common.items())
            label += " †" if is_too_early(group) else ""
        base = of_seeds(rows[BASELINE])
        for variant in (variant for variant in variants if variant in rows):
            better = [sign * gap for gap in percent_above(of_seeds(rows[variant]), base)]
            found.setdefault(label, {})[variant] = interval(better)
    return found


def over(
    name: str, chosen: Settings, variants: Iterable[str], points: Callable[[Result], list[tuple[float, float]]]
) -> Lines:
    """The points of each variant's result, their second coordinate the mean over seeds."""
    rows = rows_of(name, chosen)
    lines: Lines = {}
    for variant in variants:
        of_seeds = zip(*(points(row["result"]) for row in rows[variant]), strict=True)
        lines[variant] = [(found[0][0], fmean(y for _, y in found)) for found in of_seeds]
    return lines


def by_position(context: int) -> Callable[[Result], list[tuple[float, float]]]:
    """Perplexity at the middle of each part of the context."""

    def points(result: Result) -> list[tuple[float, float]]:
        parts = result["by position"]
        return [((part + 0.5) * context / len(parts), value) for part, value in enumerate(parts)]

    return points


def relative(lines: Lines) -> Lines:
    """Lines divided by the baseline."""
    return {
        variant: [(x, y / base) for (x, y), (_, base) in zip(points, lines[BASELINE], strict=True)]
        for variant, points in lines.items()
    }


def by_lag(result: Result) -> list[tuple[float, float]]:
    """Accuracy by lag."""
    return sorted((int(lag), accuracy) for lag, accuracy in result["by lag"].items())


def seconds() -> Lines:
    """Seconds of a training step of the large model by context."""
    lines: Lines = {}
    for cell, rows in measured_cells(EXPERIMENTS["cost"]):
        if cell["variant"] in ("dense", BASELINE, "pi"):
            lines.setdefault(cell["variant"], []).append((cell["context"], rows[0]["result"]["test"]))
    return lines


def draw(folder: Path) -> None:
    """Write every picture."""
    picture = plots.intervals(gains(), "better than ring-local attention of the same keys (%)", limits=(-60, 60))
    plots.save(picture, folder / "gains.svg")
    variants = ("dense", BASELINE, "pi", DILATED_HEADS, COORDINATED_HEADS)
    lines = relative(over("language_modelling_long", {"corpus": "linux"}, variants, by_position(2048)))
    picture = plots.curves(lines, "position in the context", "test perplexity, ring-local = 1")
    plots.save(picture, folder / "perplexity_by_position.svg")
    variants = ("dense", BASELINE, "pi", "pi, coprime heads", "dilated", "pi, planned")
    picture = plots.curves(over("recall", {"window": 16}, variants, by_lag), "lag (tokens back)", "accuracy")
    plots.save(picture, folder / "recall_by_lag.svg")
    plots.save(plots.curves(seconds(), "context (tokens)", "a step (s)", log=True), folder / "cost.svg")
