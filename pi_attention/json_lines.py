"""Files of JSON lines that grow while a process may die: each is one write, and a last one without its end is none."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> list[tuple[str, Any]]:
    """The entries of a file, each with its place in words, "FILE, line N"; none where there is no file.

    A last line that a killed process, or a full disk, left without its end is dropped with a warning.

    Raises:
        ValueError: another line is no JSON; the message names file and line.
    """
    if not path.exists():
        return []
    *lines, torn = path.read_bytes().split(b"\n")  # each line ends in one, so what follows the last was cut off
    if torn:
        warnings.warn(f"{path}: the last line is incomplete, as a crash leaves it, and dropped.", stacklevel=3)
    return [(where, _entry(line, where)) for n, line in enumerate(lines, 1) if line and (where := f"{path}, line {n}")]


def _entry(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}): delete the line.") from error


def append_json_line(path: Path, entry: Any) -> None:
    """Add an entry in one write, so that several processes may share the file; a last line without its end goes."""
    line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
    with path.open("ab+", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(line)
