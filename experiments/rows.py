"""The finished rows of the experiments: a file each, in which a row is a line of JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pi_attention.json_lines import append_json_line, read_json_lines

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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


@contextmanager
def claim(name: str, settings: dict[str, Any], folder: Path = RESULTS) -> Iterator[bool]:
    """Whether no other process measures this row; none can claim it before the end of the block, or of this process.

    A claim is the lock of one byte of the empty file NAME.claims, where the system has POSIX locks.
    """
    with (folder / f"{name}.claims").open("ab") as file:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int.from_bytes(digest[:7]))
        except BlockingIOError:
            yield False
        else:
            yield True
