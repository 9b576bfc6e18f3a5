"""A run's metrics as JSON lines: appended, read, and cut back to a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pi_attention.files import write_text
from pi_attention.json_lines import append_json_line, read_json_lines

METRICS = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file; a last one that a crash left incomplete is dropped with a warning.

    Raises:
        ValueError: another line is no JSON object with a step; the message names file and line.
    """
    entries = read_json_lines(run / METRICS)
    for where, entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise ValueError(f"{where} is no object with a step: delete the line.")
    return [entry for _, entry in entries]


def drop_metrics_after(run: Path, step: int) -> None:
    """Leave out the lines of steps that a resumed run does again."""
    kept = [line for line in read_metrics(run) if line["step"] <= step]
    write_text(run / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def append_metrics(run: Path, step: int, values: dict[str, Any]) -> None:
    """Add a line, in one write."""
    append_json_line(run / METRICS, {"step": step} | values)
