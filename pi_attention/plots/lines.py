"""Curves of measurements, and intervals."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

from pi_attention.accounting import Sizes, model_flops
from pi_attention.pattern import PiPattern
from pi_attention.plots.style import COLOURS, LOCAL, SKIP, figure_of


def curves(lines: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str, *, log: bool = False) -> Figure:
    """Lines through points (x, y) by label; `log` scales both axes."""
    figure, axes = figure_of(6, 4)
    for (label, points), colour, marker in zip(lines.items(), cycle(COLOURS), cycle("os^Dv<>p"), strict=False):
        axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=4)
    if log:
        axes.set(xscale="log", yscale="log")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)  # where it covers no line
    return figure


def intervals(
    rows: dict[str, dict[str, tuple[float, float]]], xlabel: str, *, limits: tuple[float, float] | None = None
) -> Figure:
    """Means with their intervals, mean ± half-width, by row and series; what leaves the `limits` is cut off."""
    figure, axes = figure_of(6, 0.9 + 0.32 * len(rows))
    series = list(dict.fromkeys(label for row in rows.values() for label in row))
    for number, (label, colour) in enumerate(zip(series, cycle(COLOURS), strict=False)):
        shift = 0.3 * (number / max(1, len(series) - 1) - 0.5)
        points = [(place + shift, *row[label]) for place, row in enumerate(rows.values()) if label in row]
        place, mean, half = zip(*points, strict=True)
        axes.errorbar(mean, place, xerr=half, fmt="o", color=colour, markersize=4, capsize=2, label=label)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel=xlabel, xlim=limits, yticks=range(len(rows)), yticklabels=list(rows))
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3, frameon=False)  # where it covers no interval
    return figure


def loss_curve(metrics: list[dict[str, Any]]) -> Figure:
    """Training and validation loss by step, from the lines of metrics.jsonl."""
    figure, axes = figure_of(6, 3.5)
    for key, label, colour, marker in (("loss", "training", LOCAL, ""), ("eval_loss", "validation", SKIP, "o")):
        points = [(line["step"], float(line[key])) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    return figure


def loss_by_position(position: list[int], losses: list[float]) -> Figure:
    """Mean loss over the position in the context."""
    figure, axes = figure_of(6, 3.5)
    axes.plot(position, losses, color=LOCAL, marker="o", markersize=4)
    axes.set(xlabel="position in the context", ylabel="loss (nats a token)")
    return figure


def flops_picture(patterns: dict[str, PiPattern], sizes: Sizes, lengths: list[int]) -> Figure:
    """Operations of a model's forward pass a token over the context, dense and for several patterns."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for length in lengths:
        for label, pattern in {"dense": PiPattern(length, 1, 0), **patterns}.items():
            flops = sum(model_flops([pattern] * sizes.num_hidden_layers, length, sizes).values())
            lines.setdefault(label, []).append((length, flops / length / 1e9))
    return curves(lines, "context (tokens)", "forward pass (GFLOP a token)", log=True)
