"""The look of every picture: colour-blind safe, readable in print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pi_attention.files import replacing

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


def figure_of(width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes, by the options of `subplots`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(**options)


def save(figure: Figure, path: Path) -> None:
    """Write a picture; the ending of the path is its format (png, svg, pdf)."""
    with matplotlib.rc_context(STYLE), replacing(path) as partial:
        metadata = {"Date": None} if path.suffix == ".svg" else None  # the same picture is the same file
        figure.savefig(partial, dpi=150, metadata=metadata)
