"""When coordinated heads pay: their gain over a window of as many keys, against context ÷ keys and against training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.intervals import interval
from experiments.experiment import Settings, without
from experiments.forms import BASELINE
from experiments.registry import EXPERIMENTS
from pi_attention.plots.style import COLOURS, figure_of
from report.cells import Cell, measured_cells, of_seeds, percent_above, shown
from report.markdown import NOTHING, table

FORM, HEADS = "coordinated 4", 4


@dataclass(frozen=True)
class Point:
    """The gain at one context, number of keys and length of training.

    `gains` are percent of perplexity below the window's, of each paired seed; `dense` those of dense attention, empty
    where it has no rows.
    """

    context: int
    keys: int
    tokens: int
    gains: tuple[float, ...]
    dense: tuple[float, ...]

    @property
    def settled(self) -> bool:
        """Whether dense attention is ahead of the window, so that the gain says what far keys are worth."""
        return bool(self.dense) and fmean(self.dense) > 0


def measured() -> list[Cell]:
    """The cells that have rows: of this experiment, and of the forms, at four heads, which have its first point."""
    forms = [(cell, rows) for cell, rows in measured_cells(EXPERIMENTS["forms"]) if cell["heads"] == HEADS]
    return [*measured_cells(EXPERIMENTS["law"]), *forms]


def points(cells: list[Cell], part: str = "test") -> list[Point]:
    """The points of all cells that have rows of the form and of the window with the same seed."""
    metrics = {_key(cell): of_seeds(rows, itemgetter(part)) for cell, rows in cells}

    def below(variant: str, cell: Settings, base: dict[int, float]) -> tuple[float, ...]:
        found = metrics.get(_key({**cell, "variant": variant}), {})
        return tuple(-gap for gap in percent_above(found, base))

    made = []
    for cell, _ in cells:
        if cell["variant"] == BASELINE:
            gains, dense = (below(variant, cell, metrics[_key(cell)]) for variant in (FORM, "dense"))
            if gains:
                made.append(Point(cell["context"], cell["keys"], cell["steps"] * cell["tokens"], gains, dense))
    return sorted(made, key=lambda point: (point.context, point.keys, point.tokens))


def _key(cell: Settings) -> str:
    """A cell as text; of dense attention, without the keys, which it does not have."""
    return repr(sorted((without(cell, "keys") if cell["variant"] == "dense" else cell).items()))


def picture(found: list[Point]) -> Figure:
    """Gain against context ÷ keys by context, at the training that most points have; and against training tokens.

    A hollow point stands where dense attention was behind the window.
    """
    trained = Counter(point.tokens for point in found)
    common = max(trained, key=lambda tokens: trained[tokens])
    longer = {(point.context, point.keys) for point in found if point.tokens != common}
    by_keys = [point for point in found if point.tokens == common]
    by_tokens = [point for point in found if (point.context, point.keys) in longer]
    panels = 2 if by_tokens else 1
    figure, drawn = figure_of(4 * panels, 3.6, ncols=panels, squeeze=False)
    left, *right = drawn[0]
    _draw(left, by_keys, lambda point: point.context / point.keys, lambda point: f"{point.context:,} tokens")
    left.set(xscale="log", xlabel="context ÷ keys", ylabel="perplexity below a window's (%)")
    for axes in right:
        _draw(axes, by_tokens, lambda p: p.tokens / 1e6, lambda p: f"{p.context:,} tokens, {p.keys} keys")
        axes.set(xscale="log", xlabel="tokens of training (M)")
    for axes in drawn[0]:
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter("{x:,.0f}")
    return figure


def _draw(axes: Any, found: list[Point], x: Callable[[Point], float], label: Callable[[Point], str]) -> None:
    """A line for each label, with intervals over seeds."""
    axes.axhline(0, color="black", linewidth=0.8)
    for line, colour in zip(dict.fromkeys(map(label, found)), COLOURS, strict=False):
        of_line = sorted((point for point in found if label(point) == line), key=x)
        axes.plot([x(p) for p in of_line], [fmean(p.gains) for p in of_line], color=colour, label=line)
        for point in of_line:
            mean, half = interval(list(point.gains))
            face = colour if point.settled else "white"
            axes.errorbar(x(point), mean, yerr=half, fmt="o", color=colour, markerfacecolor=face, capsize=2)
    axes.legend()


def law(cells: list[Cell]) -> str:
    """A table of all points."""
    lines = [
        [
            f"{point.context:,}",
            str(point.keys),
            f"{point.context / point.keys:.1f}",
            f"{point.tokens / 1e6:,.0f} M",
            shown(list(point.gains), 1),
            shown(list(point.dense), 1) if point.dense else "–",
            "yes" if point.settled else "no",
            str(len(point.gains)),
        ]
        for point in points(cells)
    ]
    head = ["context", "keys", "context ÷ keys", "trained on", "below a window, %", "dense below it, %"]
    return table([*head, "dense is ahead", "seeds"], lines) if lines else NOTHING
