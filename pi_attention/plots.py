"""Every picture, in one look: colour-blind safe, readable in print."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from pi_attention.accounting import Sizes, model_flops
from pi_attention.files import replacing
from pi_attention.masks import dense_masks
from pi_attention.pattern import PiPattern
from pi_attention.receptive_field import ReceptiveField
from pi_attention.tasks.influence import Influence

# Okabe and Ito's palette.
LOCAL, SKIP, THIRD, PAPER = "#0072B2", "#D55E00", "#009E73", "#FFFFFF"
COLOURS = [LOCAL, SKIP, THIRD, "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
PIXELS = 320
"""Most cells of a drawn pattern on a side: fewer than the picture has pixels."""
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "pi-attention",
}


def _figure(width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(**options)


def save(figure: Figure, path: Path) -> None:
    """Write a picture; the ending of the path is its format (png, svg, pdf)."""
    with matplotlib.rc_context(STYLE), replacing(path) as partial:
        metadata = {"Date": None} if path.suffix == ".svg" else None  # the same picture is the same file
        figure.savefig(partial, dpi=150, metadata=metadata)


def curves(lines: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str, *, log: bool = False) -> Figure:
    """Lines through points (x, y) by label; `log` scales both axes."""
    figure, axes = _figure(6, 4)
    for (label, points), colour, marker in zip(lines.items(), COLOURS, "os^Dv<>", strict=False):
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
    figure, axes = _figure(6, 0.9 + 0.32 * len(rows))
    series = list(dict.fromkeys(label for row in rows.values() for label in row))
    for number, (label, colour) in enumerate(zip(series, COLOURS, strict=False)):
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
        picture = (local[0, 0].float() + 2 * skip[0, head].float())[:, first:]
        size = [min(side, PIXELS) for side in picture.shape]  # or most of the thin diagonals would fall between pixels
        axis = axes[0, head]
        axis.imshow(
            torch.nn.functional.adaptive_max_pool2d(picture[None], size)[0].numpy(),
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


def coverage_picture(field: ReceptiveField, *, columns: int = 1024) -> Figure:
    """Which lags (columns) are seen through 1, 2, … layers (rows); lighter where only a part of a column is."""
    hops = torch.tensor(field.hops()).flip(0)[field.context - 1 - field.query :].float()
    hops = torch.where(hops < 0, float("inf"), hops)
    bins = min(columns, len(hops))
    seen = torch.stack([(hops <= layer).float() for layer in range(1, field.layers + 1)])
    share = torch.nn.functional.adaptive_avg_pool1d(seen[None], bins)[0]
    figure, axes = _figure(7, 0.9 + 0.22 * field.layers)
    axes.imshow(
        share.sqrt().numpy(), aspect="auto", cmap=LinearSegmentedColormap.from_list("seen", [PAPER, LOCAL]), vmin=0,
        vmax=1, interpolation="nearest", extent=(0, len(hops), field.layers + 0.5, 0.5),
    )  # fmt: skip
    axes.set(xlabel="lag (tokens back)", ylabel="layers")
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
    figure, axes = _figure(7, 3)
    for (label, field), colour in zip(fields.items(), COLOURS, strict=False):
        hops = torch.tensor(field.hops()).flip(0)[field.context - 1 - field.query :].double()
        axes.plot(torch.where(hops < 0, torch.nan, hops).numpy(), label=label, color=colour, linewidth=0.8)
    axes.set(xlabel="lag (tokens back)", ylabel="layers needed")
    axes.legend()
    return figure


def flops_picture(patterns: dict[str, PiPattern], sizes: Sizes, lengths: list[int]) -> Figure:
    """Operations of a model's forward pass a token over the context, dense and for several patterns."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for length in lengths:
        for label, pattern in {"dense": PiPattern(length, 1, 0), **patterns}.items():
            flops = sum(model_flops([pattern] * sizes.num_hidden_layers, length, sizes).values())
            lines.setdefault(label, []).append((length, flops / length / 1e9))
    return curves(lines, "context (tokens)", "forward pass (GFLOP a token)", log=True)


def influence_picture(found: Influence) -> Figure:
    """The Jacobian's norm by lag, coloured by the layers that a lag needs; predicted holes are left blank."""
    figure, axes = _figure(7, 3.2)
    hops, lag = torch.tensor(found.field.hops()), found.field.query - torch.arange(found.field.context)
    for layers in range(found.field.layers + 1):
        chosen = (hops == layers) & (found.norm > 0)
        if bool(chosen.any()):
            colour = COLOURS[layers % len(COLOURS)]
            axes.scatter(lag[chosen], found.norm[chosen], s=4, color=colour, label=f"{layers} layers")
    axes.set(xlabel="lag (tokens back)", ylabel="norm of the gradient", yscale="log")
    axes.legend(ncols=2, markerscale=3)
    return figure


def mass_by_lag_picture(maps: list[Tensor]) -> Figure:
    """Mean attention weight by lag and layer, from attention maps [B, H, T, T] of every layer."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for layer, weights in enumerate(maps):
        mean = weights.double().mean(dim=(0, 1))
        lines[f"layer {layer}"] = [
            (lag + 1, value) for lag in range(len(mean)) if (value := float(mean.diagonal(-lag).mean())) > 0
        ]
    figure, axes = _figure(7, 3.2)
    for (label, points), colour in zip(lines.items(), itertools.cycle(COLOURS), strict=False):
        axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=".", markersize=2, linestyle="")
    axes.set(xlabel="lag + 1 (tokens back)", ylabel="mean attention weight", xscale="log", yscale="log")
    axes.legend(ncols=2, markerscale=4)
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
