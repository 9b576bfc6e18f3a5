"""The finished rows of the experiments: a file each, in which a row is a line of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pi_attention.json_lines import append_json_line, read_json_lines

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]
"""Settings, result, seconds, device, torch and date."""


def load(name: str, folder: Path = RESULTS) -> list[Row]:
    """The finished rows of an experiment; those of its older file NAME.json, one object for all rows, come first.

    Raises:
        ValueError: a line is no JSON; the message names file and line.
    """
    older = folder / f"{name}.json"
    rows: list[Row] = json.loads(older.read_bytes())["rows"] if older.exists() else []
    return rows + [row for _, row in read_json_lines(folder / f"{name}.jsonl")]


def append(name: str, row: Row, folder: Path = RESULTS) -> None:
    """Add a finished row; several processes may do so at once."""
    append_json_line(folder / f"{name}.jsonl", row)
