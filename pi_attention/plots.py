"""Every picture, in one look: colour-blind safe, readable in print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from pi_attention.masks import dense_masks
from pi_attention.pattern import PiPattern

# Okabe and Ito's palette.
LOCAL, SKIP, THIRD, PAPER = "#0072B2", "#D55E00", "#009E73", "#FFFFFF"
COLOURS = [LOCAL, SKIP, THIRD, "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
    "legend.frameon": False,
}


def _figure(width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(**options)


def save(figure: Figure, path: Path) -> None:
    """Write a picture; the ending of the path is its format (png, svg, pdf)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=150)


def curves(lines: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str, *, log: bool = False) -> Figure:
    """Lines through points (x, y) by label; `log` scales both axes."""
    figure, axes = _figure(6, 3.5)
    for (label, points), colour, marker in zip(lines.items(), COLOURS, "os^Dv<>", strict=False):
        axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=4)
    if log:
        axes.set(xscale="log", yscale="log")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend()
    return figure


def loss_curve(metrics: list[dict[str, Any]]) -> Figure:
    """Training and validation loss by step, from the lines of metrics.jsonl."""
    figure, axes = _figure(6, 3.5)
    for key, label, colour, marker in (("loss", "training", LOCAL, ""), ("eval_loss", "validation", SKIP, "o")):
        points = [(line["step"], float(line[key])) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend()
    return figure


def loss_by_position(position: list[int], losses: list[float]) -> Figure:
    """Mean loss over the position in the context."""
    figure, axes = _figure(6, 3.5)
    axes.plot(position, losses, color=LOCAL, marker="o", markersize=4)
    axes.set(xlabel="position in the context", ylabel="loss (nats a token)")
    return figure


def telling_length(pattern: PiPattern, context: int) -> int:
    """A length at which a picture shows the whole reach of a pattern, within the context."""
    return min(context, 1024 if pattern.reach is None else pattern.reach * 5 // 4 + 2)


def pattern_picture(pattern: PiPattern, length: int, *, most: int = 1280) -> Figure:
    """Which keys (columns) the last queries (rows) of `length` tokens see: local band, skip band.

    At most `most` positions are drawn, the last ones.
    """
    local, skip = dense_masks(pattern, length if length <= most else most, length)
    heads = skip.shape[1]
    columns = min(heads, 4)
    first = max(0, length - most)
    figure, axes = _figure(3.2 * columns + 0.6, 3.4, ncols=columns, squeeze=False)
    for head in range(columns):
        picture = local[0, 0].int() + 2 * skip[0, head].int()
        axis = axes[0, head]
        axis.imshow(
            picture[:, first:].numpy(),
            cmap=ListedColormap([PAPER, LOCAL, SKIP]),
            vmin=0,
            vmax=2,
            interpolation="nearest",
            extent=(first, length, length, first),
        )
        period = pattern.period_of(head)
        axis.set_title(f"window {pattern.window}, period {period}, skips {pattern.skips}", fontsize=8)
        axis.set(xlabel="key position")
        axis.grid(False)
    axes[0, 0].set(ylabel="query position")
    return figure


def gate_picture(gates: list[Tensor]) -> Figure:
    """Weight g of the local band by layer, head and position; each entry is a layer's [H, T]. White: no skip key."""
    figure, axes = _figure(8, 0.6 + 0.9 * len(gates), nrows=len(gates), squeeze=False, sharex=True)
    for layer, gate in enumerate(gates):
        heads, length = gate.shape
        shown = torch.nn.functional.adaptive_avg_pool1d(gate[None], min(length, 256))[0]
        axis = axes[layer, 0]
        axis.imshow(
            shown.numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest",
            extent=(0, length, heads - 0.5, -0.5),
        )  # fmt: skip
        axis.set(ylabel=f"layer {layer}\nhead", yticks=range(heads))
        axis.grid(False)
    axes[-1, 0].set(xlabel="position in the context")
    figure.colorbar(axes[0, 0].images[0], ax=axes, label="weight of the local band")
    return figure
