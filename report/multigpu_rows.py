"""The rows of results/multigpu.jsonl: the last of each setting, found by their settings, and what they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.multigpu.rows import OUT_OF_MEMORY, Row
from benchmarks.multigpu.ways import GATHER, HALO, RING

Table = Callable[[list[str], list[list[str]]], str]
"""A Markdown table of a head and rows."""
LABELS = {HALO: "halo", GATHER: "all-gather", RING: "dense Ring Attention"}
NONE = "–"
SETTINGS = ("gpu", "piece", "ranks", "model", "layers", "layout", "zero", "way", "pattern", "S", "loss slice", "blocks",
            "hollow", "resumed from", "signal")  # fmt: skip
"""What tells a measurement from another."""


def latest(rows: Iterable[Row]) -> list[Row]:
    """Rows in their order, without those that were measured again, and without what failed for want of time."""
    last: dict[tuple[Any, ...], Row] = {}
    for row in (row for row in rows if row.get("failed") in (None, OUT_OF_MEMORY)):
        settings = tuple(row.get(name) for name in SETTINGS)
        last.pop(settings, None)
        last[settings] = row
    return list(last.values())


def of_widest(rows: list[Row]) -> list[Row]:
    """Rows of the kind of GPU of which most were measured together; of two kinds, the one measured last."""
    widest = max(rows, key=lambda row: (row["ranks"], row["date"]), default=None)
    return [row for row in rows if widest is not None and row["gpu"] == widest["gpu"]]


def found(rows: Iterable[Row], **settings: Any) -> Row | None:
    """The last row of these settings that was measured; `_` in a name is a space."""
    wanted = {name.replace("_", " "): value for name, value in settings.items()}
    fitting = [row for row in rows if "failed" not in row and wanted.items() <= row.items()]
    return fitting[-1] if fitting else None


def values(rows: Iterable[Row], name: str, **settings: Any) -> list[Any]:
    """The values of a field in rows of these settings, sorted."""
    return sorted({row[name] for row in rows if name in row and settings.items() <= row.items()})


def shared(rows: Iterable[Row], model: str) -> list[Row]:
    """Steps of a model whose sequence all GPUs share, measured or out of memory: one period, loss by slices, ZeRO-3."""
    asked = {"piece": "step", "model": model, "layers": None, "loss slice": 4096, "pattern": "one period", "zero": 3}
    steps = [row for row in rows if asked.items() <= row.items()]
    return [row for row in steps if row["layout"] == f"dp=1,tp=1,cp={row['ranks']}"]


def model_name(model: str) -> str:
    """The size of "1b" with a space, as "1 B"."""
    return f"{model[:-1]} B" if model.endswith("b") else model
