"""What the quality of a form costs: perplexity against the products of a prompt's attention, and the decoding cache."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from matplotlib.figure import Figure

from benchmarks.intervals import interval
from experiments.experiment import Settings
from experiments.forms import BASELINE
from experiments.registry import EXPERIMENTS
from pi_attention.accounting import stack_cost
from pi_attention.plots.style import COLOURS, figure_of
from report.cells import Cell, measured_cells
from report.keys import patterns
from report.language_models import percent

LENGTH = 131072
"""Tokens of the prompt."""


@dataclass(frozen=True)
class Point:
    """A form: how many percent its perplexity is above dense attention's, of each seed, and what share of its cost."""

    name: str
    gaps: tuple[float, ...]
    products: float
    cache: float


def shares(cell: Settings) -> tuple[float, float]:
    """The products of a prompt's attention and the kept tokens of a cell's layers, as shares of dense attention's."""
    layers = patterns("hybrids", {**cell, "context": LENGTH})
    cost = stack_cost(layers, LENGTH, heads=cell["heads"], kv_heads=1, head_dim=1)
    return cost["flops"] / cost["dense flops"], cost["cache bytes"] / cost["dense cache bytes"]


def points(cells: list[Cell]) -> list[Point]:
    """The forms that have rows of the same seeds as dense attention."""
    found = []
    for cell, _ in cells:
        gaps = tuple(percent(cells, cell["variant"], "dense"))
        if gaps:
            found.append(Point(cell["variant"].replace(BASELINE, "window"), gaps, *shares(cell)))
    return found


def measured() -> list[Point]:
    """Those of the hybrids."""
    return points(measured_cells(EXPERIMENTS["hybrids"]))


def front(found: list[Point], cost: str) -> list[Point]:
    """The points that no other one beats in both, the cheapest first."""
    kept: list[Point] = []
    for point in sorted(found, key=lambda point: (getattr(point, cost), fmean(point.gaps))):
        if not kept or fmean(point.gaps) < fmean(kept[-1].gaps):
            kept.append(point)
    return kept


def picture(found: list[Point]) -> Figure:
    """A panel for each cost; a line joins the points that no other one beats."""
    figure, panels = figure_of(10, 3.8, ncols=2, sharey=True)
    costs = {"products": "products of a prompt's attention", "cache": "tokens kept in the cache"}
    for axes, (cost, words) in zip(panels, costs.items(), strict=True):
        line = front(found, cost)
        axes.step([getattr(p, cost) for p in line], [fmean(p.gaps) for p in line], where="post", color="lightgrey")
        for point, colour in zip(found, COLOURS * 9, strict=False):
            mean, half = interval(list(point.gaps))
            axes.errorbar(getattr(point, cost), mean, yerr=half, fmt="o", color=colour, capsize=2, label=point.name)
        axes.set(xscale="log", xlabel=f"{words},\nshare of dense attention's at {LENGTH:,} tokens")
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    panels[0].set_ylabel("perplexity above dense attention's (%)")
    panels[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
