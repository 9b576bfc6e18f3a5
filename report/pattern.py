"""The picture on top of the README: what the queries of one head see, with a label for each part."""

from __future__ import annotations

from typing import Any

import matplotlib
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pi_attention import PiPattern
from pi_attention.masks import dense_masks
from pi_attention.plots import LOCAL, PAPER, SINKS, SKIP, STYLE

PATTERN = PiPattern(window=4, period=6, skips=3, sinks=1)
LENGTH = 24
QUERY = LENGTH - 1
"""The query whose row is framed."""
DARK_SINKS = "#1C6E9C"
"""For words, which need more contrast than tiles."""


def labelled_pattern() -> Figure:
    """Queries by keys of one head: window, skips and sinks in their colours, named beside them."""
    local, skip = (mask[0, 0] for mask in dense_masks(PATTERN, LENGTH, LENGTH))
    seen = torch.tensor(to_rgb(PAPER)).repeat(LENGTH, LENGTH, 1)
    seen[skip], seen[local] = torch.tensor(to_rgb(SKIP)), torch.tensor(to_rgb(LOCAL))
    distance = PATTERN.distance(torch.arange(LENGTH)[:, None], torch.arange(LENGTH), LENGTH)
    seen[local & (distance >= PATTERN.window)] = torch.tensor(to_rgb(SINKS))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 5.2), layout="constrained")
        axes = figure.subplots()
        axes.imshow(seen.numpy(), extent=(0, LENGTH, LENGTH, 0), interpolation="nearest")
        axes.set(xticks=range(LENGTH + 1), yticks=range(LENGTH + 1), ylabel="← query position")
        axes.tick_params(length=0, labelbottom=False, labelleft=False)
        axes.set_title("key position →", fontsize=9)
        axes.grid(color="#E8ECF0", linewidth=0.6, alpha=1)
        axes.add_patch(Rectangle((0, QUERY), QUERY + 1, 1, fill=False, linewidth=1.8, clip_on=False))
        middle = [QUERY + 0.5 - number * PATTERN.period for number in range(1, PATTERN.skips + 1)]
        _tell(axes, "sink:\nthe first key", DARK_SINKS, 1.2, [0.5])
        _tell(axes, f"skips:\nevery {PATTERN.period}th key, {PATTERN.skips} of them", SKIP, middle[1], middle)
        _tell(axes, f"window:\nthe last {PATTERN.window} keys", LOCAL, LENGTH - 2.3, [QUERY - 1])
        axes.text(LENGTH * 0.7, LENGTH * 0.25, "the future:\nnot seen", color="#68727D", ha="center", fontsize=11)
    return figure


def _tell(axes: Any, words: str, colour: str, place: float, columns: list[float]) -> None:
    """Write words below the framed row, with an arrow to each of the columns."""
    for column in columns:
        arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.2}
        axes.annotate("", (column, LENGTH + 0.05), (place, LENGTH + 1.7), arrowprops=arrow, annotation_clip=False)
    axes.text(place, LENGTH + 1.8, words, color=colour, fontsize=11, ha="center", va="top")
