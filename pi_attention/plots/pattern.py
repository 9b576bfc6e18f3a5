"""One layer of a pattern: queries by keys, and the lags of its heads."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from pi_attention.describe import by_layers, in_words, is_dense
from pi_attention.pattern import Band, PiPattern
from pi_attention.plots.style import HEADS, LOCAL, PAPER, PIXELS, SINKS, figure_of
from pi_attention.receptive_field import joint_coverage
from pi_attention.units import counted


def telling_length(pattern: PiPattern, context: int) -> int:
    """A length at which a picture shows the whole reach of a pattern, within the context."""
    return min(context, 1024 if pattern.reach is None else pattern.reach * 5 // 4 + 2)


def heads_alike(pattern: PiPattern) -> dict[Band, list[int]]:
    """The skip bands of a pattern that differ, each with the heads that have it."""
    heads: dict[Band, list[int]] = {}
    for head, band in enumerate(pattern.skip_bands() if pattern.skips != 0 else ()):
        heads.setdefault(band, []).append(head)
    return heads


def seen_by(pattern: PiPattern, length: int, cell: int) -> Tensor:
    """Which bands a cell of `cell` × `cell` pairs holds, by diagonal: [1 + bands, 2n − 1] bool, the window first.

    The n − 1 of the diagonals stand for keys after the query; a pair of tokens is visible by its lag alone.
    """
    cells = -(-length // cell)
    most = cells * cell
    distance = pattern.distance(torch.arange(1 - most, most), 0, length)
    bands = (pattern.local_band, *heads_alike(pattern))
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


def _mask_axis(axis: Any, pattern: PiPattern, length: int, whose: str) -> None:
    """Queries by keys of one layer, all heads together."""
    cell = -(-length // PIXELS)  # or most of the thin diagonals would fall between pixels
    cells = -(-length // cell)
    colours = _in_colours(seen_by(pattern, length, cell))
    row, column = torch.arange(cells)[:, None], torch.arange(cells)
    picture = colours[row - column + cells - 1]
    window = seen_by(pattern, length, cell)[0][row - column + cells - 1]
    picture[(column * cell < pattern.sinks) & (column <= row) & ~window] = torch.tensor(to_rgb(SINKS))
    axis.imshow(picture.numpy(), interpolation="nearest", extent=(0, cells * cell, cells * cell, 0))
    if cells <= 64:  # each pair is a tile
        axis.set_xticks(range(cells + 1), minor=True)
        axis.set_yticks(range(cells + 1), minor=True)
        axis.grid(which="minor", color="#E8ECF0", linewidth=0.6, alpha=1)
        axis.tick_params(which="minor", length=0)
    axis.grid(visible=False, which="major")
    axis.set(xlim=(0, length), ylim=(length, 0), xlabel="key position", ylabel="query position")
    axis.set_title(f"{whose}, all heads", fontsize=9)


def _lags_axis(axis: Any, pattern: PiPattern, length: int, *, most: int = 16) -> None:
    """One row of lags for each kind of head, and one for what they see together."""
    heads = heads_alike(pattern)
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
    then = f"; {counted(holes, 'hole')} up to {covered.reach:,}" if holes else ""
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


def stack_picture(patterns: Sequence[PiPattern], context: int) -> Figure:
    """`pattern_picture` of the first layer that is not dense, if there is one, named with the layers like it.

    What the other layers see is told in words.
    """
    layers = by_layers(patterns)
    shown = next((pattern for pattern in layers if not is_dense(pattern, context)), patterns[0])
    whose = "one layer" if len(layers) == 1 else f"{layers[shown]} of {len(patterns)}"
    figure = pattern_picture(shown, telling_length(shown, context), whose)
    others = [f"{where}: {in_words(pattern, context)}" for pattern, where in layers.items() if pattern != shown]
    figure.supxlabel("\n".join(wrap("; ".join(others), 140)), fontsize=8)
    return figure


def pattern_picture(pattern: PiPattern, length: int, whose: str = "one layer") -> Figure:
    """The keys that the queries of `length` tokens see in one layer: window, skips in the colour of their head, sinks.

    Left: queries by keys, all heads together. Right: the lags of each kind of head, and what they see together.
    """
    heads = heads_alike(pattern)
    height = max(4.1, 1.6 + 0.36 * min(len(heads), 16))
    figure, axes = figure_of(10, height, ncols=2, width_ratios=[height - 1, 10.4 - height])
    _mask_axis(axes[0], pattern, length, whose)
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
