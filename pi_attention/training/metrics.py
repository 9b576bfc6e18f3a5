"""A run's metrics as JSON lines: appended, read, and cut back to a checkpoint."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from pi_attention.files import write_text

METRICS = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file; a last one that a crash left incomplete is dropped with a warning.

    Raises:
        ValueError: another line is no JSON object with a step; the message names file and line.
    """
    file = run / METRICS
    if not file.exists():
        return []
    *lines, torn = file.read_bytes().split(b"\n")  # each line ends in one, so what follows the last was cut off
    if torn:
        warnings.warn(f"{file}: the last line is incomplete, as a crash leaves it, and dropped.", stacklevel=2)
    return [_entry(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line]


def _entry(line: bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}): delete the line.") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        raise ValueError(f"{where} is no object with a step: delete the line.")
    return entry


def drop_metrics_after(run: Path, step: int) -> None:
    """Leave out the lines of steps that a resumed run does again."""
    kept = [line for line in read_metrics(run) if line["step"] <= step]
    write_text(run / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def append_metrics(run: Path, step: int, values: dict[str, Any]) -> None:
    """Add a line, in one write."""
    line = json.dumps({"step": step} | values) + "\n"
    with (run / METRICS).open("ab", buffering=0) as lines:
        lines.write(line.encode())
