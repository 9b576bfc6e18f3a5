"""Files of JSON lines that grow while a process may die: a last one without its end is none."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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
    """Add an entry; several processes may do so at once. A last line without its end goes.

    Raises:
        OSError: the disk is full.
    """
    line = json.dumps(entry).encode() + b"\n"
    with path.open("ab+", buffering=0) as file, _alone(file):
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
        if file.write(line) != len(line):
            raise OSError(f"{path}: the disk took a part of a line only: free some space.")


@contextmanager
def _alone(file: FileIO) -> Iterator[None]:
    """Nobody else appends meanwhile, where the system has POSIX locks; the file's end releases the lock."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)
    yield
