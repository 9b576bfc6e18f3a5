"""The finished rows of the experiments: a file each, in which a row is a line of JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]
"""Settings, result, seconds, device, torch and date."""


def load(name: str, folder: Path = RESULTS) -> list[Row]:
    """The finished rows of an experiment; those of its older file NAME.json, one object for all rows, come first.

    Raises:
        ValueError: a line is no JSON; the message names file and line.
    """
    older, path = folder / f"{name}.json", folder / f"{name}.jsonl"
    rows: list[Row] = json.loads(older.read_bytes())["rows"] if older.exists() else []
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # what follows the last "\n" was cut off
    for number, line in enumerate(whole, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON ({error}): delete the line.") from error
    return rows


def append(name: str, row: Row, folder: Path = RESULTS) -> None:
    """Add a finished row: one write at the end of the file, so that several processes may share it."""
    path = folder / f"{name}.jsonl"
    if path.exists():
        _drop_unfinished(path)
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(row).encode() + b"\n")


def _drop_unfinished(path: Path) -> None:
    """Cut off a last line that a killed process, or a full disk, left without its end."""
    found = path.read_bytes()
    whole = found.rfind(b"\n") + 1
    if whole < len(found):
        os.truncate(path, whole)
