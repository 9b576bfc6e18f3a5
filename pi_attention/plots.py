"""Every picture, in one look: colour-blind safe, readable in print."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from pi_attention.accounting import Sizes, model_flops
from pi_attention.files import replacing
from pi_attention.pattern import Band, PiPattern
from pi_attention.receptive_field import ReceptiveField, joint_coverage, key_density
from pi_attention.tasks.influence import Influence

# Okabe and Ito's palette.
LOCAL, SKIP, THIRD, PAPER = "#0072B2", "#D55E00", "#009E73", "#FFFFFF"
COLOURS = [LOCAL, SKIP, THIRD, "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
HEADS = [SKIP, THIRD, "#CC79A7", "#E69F00", "#8A6BBE", "#7A4B1E", "#4D4D4D", "#A3B82C"]
"""The colours of the heads' skips, beside those of the window and of the sinks."""
SINKS = "#56B4E9"
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


def _heads_alike(pattern: PiPattern) -> dict[Band, list[int]]:
    """The skip bands of a pattern that differ, each with the heads that have it."""
    heads: dict[Band, list[int]] = {}
    for head, band in enumerate(pattern.skip_bands() if pattern.skips != 0 else ()):
        heads.setdefault(band, []).append(head)
    return heads


def _seen_by(pattern: PiPattern, length: int, cell: int) -> Tensor:
    """Which bands a cell of `cell` × `cell` pairs holds, by diagonal: [1 + bands, 2n − 1] bool, the window first.

    The n − 1 of the diagonals stand for keys after the query; a pair of tokens is visible by its lag alone.
    """
    cells = -(-length // cell)
    most = cells * cell
    distance = pattern.distance(torch.arange(1 - most, most), 0, length)
    bands = (pattern.local_band, *_heads_alike(pattern))
    count = torch.stack([band.contains(distance) for band in bands]).long().cumsum(1)
    count = torch.nn.functional.pad(count, (1, 0))  # count[:, i]: lags seen below the lag i − most + 1
    centre = (torch.arange(1 - cells, cells) * cell) + most - 1
    return count[:, (centre + cell).clamp(max=2 * most - 1)] > count[:, (centre - cell + 1).clamp(min=0)]


def _in_colours(seen: Tensor) -> Tensor:
    """The colour of each diagonal, [N, 3]: the window's, or that of a head that sees it; several heads take turns."""
    palette = torch.tensor([to_rgb(colour) for colour in (PAPER, LOCAL, *HEADS)])
    chosen = []
    for diagonal, column in enumerate(seen.T.tolist()):
        heads = [band for band, visible in enumerate(column) if visible]
        if not heads or heads[0] == 0:
            chosen.append(len(heads[:1]))
        else:
            chosen.append(2 + (heads[diagonal % len(heads)] - 1) % len(HEADS))
    return palette[chosen]


def _label(pattern: PiPattern, band: Band, heads: list[int], *, few: int = 3) -> str:
    """Words for the heads that share a band."""
    if len(pattern.periods) == 1:
        who = "every head"
    else:
        shown = ", ".join(map(str, heads[:few])) + (" …" if len(heads) > few else "")
        who = f"head{'s' if len(heads) > 1 else ''} {shown}"
    several = len(set(pattern.periods)) > 1 or not any(pattern.phases)
    what = [f"period {band.stride}"] if several else []
    what += [f"phase {band.phase}"] if any(pattern.phases) else []
    return f"{who}: {', '.join(what)}"


def _mask_axis(axis: Any, pattern: PiPattern, length: int) -> None:
    """Queries by keys of one layer, all heads together."""
    cell = -(-length // PIXELS)  # or most of the thin diagonals would fall between pixels
    cells = -(-length // cell)
    colours = _in_colours(_seen_by(pattern, length, cell))
    row, column = torch.arange(cells)[:, None], torch.arange(cells)
    picture = colours[row - column + cells - 1]
    window = _seen_by(pattern, length, cell)[0][row - column + cells - 1]
    picture[(column * cell < pattern.sinks) & (column <= row) & ~window] = torch.tensor(to_rgb(SINKS))
    axis.imshow(picture.numpy(), interpolation="nearest", extent=(0, cells * cell, cells * cell, 0))
    if cells <= 64:  # each pair is a tile
        axis.set_xticks(range(cells + 1), minor=True)
        axis.set_yticks(range(cells + 1), minor=True)
        axis.grid(which="minor", color="#E8ECF0", linewidth=0.6, alpha=1)
        axis.tick_params(which="minor", length=0)
    axis.grid(visible=False, which="major")
    axis.set(xlim=(0, length), ylim=(length, 0), xlabel="key position", ylabel="query position")
    axis.set_title("one layer, all heads", fontsize=9)


def _lags_axis(axis: Any, pattern: PiPattern, length: int, *, most: int = 16) -> None:
    """One row of lags for each kind of head, and one for what they see together."""
    heads = _heads_alike(pattern)
    reach = length - 1 if pattern.reach is None else min(pattern.reach, length - 1)
    lags = reach + 1 + max(2, reach // 16)
    cell = -(-lags // PIXELS)
    bins = -(-lags // cell)
    distance = torch.arange(bins * cell)
    rows: dict[str, tuple[str, Tensor]] = {}
    near = pattern.local_band.contains(distance)
    for number, (band, alike) in enumerate([*heads.items()][:most]):
        rows[_label(pattern, band, alike)] = HEADS[number % len(HEADS)], band.contains(distance) & (distance < length)
    if not heads:
        rows["every head"] = LOCAL, torch.zeros_like(near)
    for row, (colour, skip) in enumerate(rows.values()):
        _strip(axis, row, torch.tensor([to_rgb(colour)]).expand(bins, 3), near, skip, cell)
    labels = list(rows)
    if len(heads) > 1:
        place = len(rows) + 0.35
        together = torch.stack([band.contains(distance) & (distance < length) for band in heads]).any(0)
        window_and_heads = torch.stack([near, *(band.contains(distance) for band in heads)])
        by_bin = window_and_heads.reshape(len(heads) + 1, bins, cell).any(2)
        _strip(axis, place, _in_colours(by_bin), near, together, cell)
        labels.append("together" + ("" if len(heads) <= most else f" ({len(heads)} kinds)"))
        axis.axhline(place - 0.68, color="#A0A8B2", linewidth=0.6)
    places: list[float] = [*range(len(rows)), *([len(rows) + 0.35] if len(heads) > 1 else [])]
    covered = joint_coverage(pattern, length)
    holes = len(covered.holes())
    stretch = f"{'together they see' if len(heads) > 1 else 'a query sees'} every lag from 0 to {covered.stretch - 1:,}"
    axis.set(
        xlim=(0, bins * cell),
        ylim=(max(1.2, places[-1] + 0.6), -0.6 if places[1:] else -1.2),
        xlabel="lag (tokens back)",
    )
    axis.set_yticks(places, labels=labels)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(visible=False)
    then = f"; {holes:,} hole{'s' if holes > 1 else ''} up to {covered.reach:,}" if holes else ""
    axis.set_title(stretch + then, fontsize=9)


def _strip(axis: Any, place: float, colours: Tensor, near: Tensor, skip: Tensor, cell: int) -> None:
    """One row: the window, and skips [bins · cell] in the colours [bins, 3], paler where a bin holds some lags only."""
    bins = len(colours)
    share = [lags.reshape(bins, cell).float().mean(1) for lags in (near, skip & ~near)]
    local = torch.tensor(to_rgb(LOCAL)).expand(bins, 3)
    chosen = torch.where((share[0] > 0)[:, None], local, colours)
    alpha = torch.where(share[0] > 0, share[0], share[1])
    alpha = torch.where(alpha > 0, alpha.sqrt().clamp(min=0.3), 0)
    picture = torch.cat([chosen, alpha[:, None]], dim=1)[None]
    extent = (0, bins * cell, place + 0.4, place - 0.4)
    axis.imshow(picture.numpy(), aspect="auto", interpolation="nearest", extent=extent)
    if bins <= 64:
        axis.vlines(range(1, bins), place - 0.4, place + 0.4, color=PAPER, linewidth=0.8)


def pattern_picture(pattern: PiPattern, length: int) -> Figure:
    """The keys that the queries of `length` tokens see in one layer: window, skips in the colour of their head, sinks.

    Left: queries by keys, all heads together. Right: the lags of each kind of head, and what they see together.
    """
    heads = _heads_alike(pattern)
    height = max(4.1, 1.6 + 0.36 * min(len(heads), 16))
    figure, axes = _figure(10, height, ncols=2, width_ratios=[height - 1, 10.4 - height])
    _mask_axis(axes[0], pattern, length)
    _lags_axis(axes[1], pattern, length)
    count = "all" if pattern.skips is None else f"{pattern.skips:,}"
    entries = {f"window: the last {pattern.window:,} keys" if pattern.causal else f"window {pattern.window:,}": LOCAL}
    for number, band in enumerate([*heads][: len(HEADS)]):
        entries[f"{count} skips of {_label(pattern, band, heads[band]).partition(':')[0]}"] = HEADS[number]
    if pattern.sinks:
        entries[f"sinks: the first {pattern.sinks:,} keys"] = SINKS
    patches = [Patch(color=colour, label=label) for label, colour in entries.items()]
    figure.legend(
        handles=patches, loc="outside upper center", ncols=6 if len(patches) < 7 else 5, frameon=False, fontsize=8
    )
    return figure


def density_picture(patterns: dict[str, PiPattern], context: int) -> Figure:
    """How many keys a lag has, in the mean over heads, by octaves of lag; beside it a density that falls like 1/lag."""
    figure, axes = _figure(7, 3.6)
    for number, (label, pattern) in enumerate(patterns.items()):
        look = {
            "color": COLOURS[number % len(COLOURS)],
            "linewidth": max(1.2, 3.6 - 0.7 * number),
        }  # what is below shows
        octaves = [(first, last, float(density)) for first, last, density in key_density(pattern, context)]
        edges = [max(first, 1) for first, _, _ in octaves] + [context]
        axes.stairs([density or float("nan") for *_, density in octaves], edges, baseline=None, label=label, **look)
    widest = max(pattern.window for pattern in patterns.values())
    axes.plot([widest, context], [1, widest / context], color="#808890", linestyle=":", label="∝ 1/lag")
    axes.set(
        xlabel="lag (tokens back)", ylabel="keys a lag, mean of heads", xscale="log", yscale="log", xlim=(1, context)
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
