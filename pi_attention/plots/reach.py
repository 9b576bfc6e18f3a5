"""What stacks of layers see, and how many keys a lag has."""

from __future__ import annotations

from itertools import cycle

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from pi_attention.describe import is_dense
from pi_attention.pattern import PiPattern
from pi_attention.plots.lines import curves
from pi_attention.plots.style import COLOURS, LOCAL, PAPER, figure_of
from pi_attention.receptive_field import ReceptiveField, key_density


def density_picture(patterns: dict[str, PiPattern], context: int) -> Figure:
    """How many keys a lag has, in the mean over heads, by octaves of lag; beside it a density that falls like 1/lag."""
    figure, axes = figure_of(7, 3.6)
    for number, (label, pattern) in enumerate(patterns.items()):
        look = {
            "color": COLOURS[number % len(COLOURS)],
            "linewidth": max(1.2, 3.6 - 0.7 * number),
        }  # what is below shows
        octaves = [(first, last, float(density)) for first, last, density in key_density(pattern, context)]
        edges = [max(first, 1) for first, _, _ in octaves] + [context]
        axes.stairs([density or float("nan") for *_, density in octaves], edges, baseline=None, label=label, **look)
    windows = [pattern.window for pattern in patterns.values() if not is_dense(pattern, context)]
    if windows:
        axes.plot([max(windows), context], [1, max(windows) / context], color="#808890", linestyle=":", label="∝ 1/lag")
    axes.set(
        xlabel="lag (tokens back)",
        ylabel="keys a lag, mean of heads",
        xscale="log",
        yscale="log",
        xlim=(1, max(context, 2)),
    )
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def coverage_picture(field: ReceptiveField, *, columns: int = 1024) -> Figure:
    """Which lags (columns) are seen through 1, 2, … layers (rows); lighter where only a part of a column is."""
    hops = torch.tensor(field.hops()).flip(0)[field.context - 1 - field.query :].float()
    hops = torch.where(hops < 0, float("inf"), hops)
    bins = min(columns, len(hops))
    seen = torch.stack([(hops <= layer).float() for layer in range(1, field.layers + 1)])
    share = torch.nn.functional.adaptive_avg_pool1d(seen[None], bins)[0]
    figure, axes = figure_of(7, 0.9 + 0.22 * field.layers)
    axes.imshow(
        share.sqrt().numpy(), aspect="auto", cmap=LinearSegmentedColormap.from_list("seen", [PAPER, LOCAL]), vmin=0,
        vmax=1, interpolation="nearest", extent=(0, len(hops), field.layers + 0.5, 0.5),
    )  # fmt: skip
    axes.set(xlabel="lag (tokens back)", ylabel="layers, counted from the last")
    axes.grid(False)
    return figure


def growth_picture(fields: dict[str, ReceptiveField]) -> Figure:
    """Positions that the last token sees, by layers, for several patterns."""
    lines = {label: [(n, field.covered(n)) for n in range(1, field.layers + 1)] for label, field in fields.items()}
    figure = curves(lines, "layers", "positions seen")  # type: ignore[arg-type]
    figure.axes[0].set(yscale="log")
    return figure


def hops_picture(fields: dict[str, ReceptiveField]) -> Figure:
    """The fewest layers through which each lag is seen, for several patterns; a gap where there are too few."""
    figure, axes = figure_of(7, 3)
    for (label, field), colour in zip(fields.items(), cycle(COLOURS), strict=False):
        hops = torch.tensor(field.hops()).flip(0)[field.context - 1 - field.query :].double()
        axes.plot(torch.where(hops < 0, torch.nan, hops).numpy(), label=label, color=colour, linewidth=0.8)
    axes.set(xlabel="lag (tokens back)", ylabel="layers needed")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)  # where it covers no line
    return figure
