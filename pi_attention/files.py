"""Files that are whole or absent: written under another name, on the disk, then renamed."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"
"""Before the name of what is not complete."""


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Have all files and folders of a folder on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name under which to write a file that appears as `path` when complete; its folder is made.

    A process that is killed leaves the earlier file, or none, and perhaps a hidden one that the next write replaces.

    Raises:
        OSError: the disk is full, or refuses the file; `filename` names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{path.name}")  # keeps the ending, which names a picture's format
    partial.unlink(missing_ok=True)  # it may be a link to elsewhere
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # so is a full disk told of
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def replacing_folder(folder: Path, last: str) -> Iterator[Path]:
    """The folder in which to write files that appear in `folder` when all are complete.

    A new folder appears as a whole. Into one that holds other files they are moved one by one, `last` at the end: where
    that file is, all are. A block that raises leaves nothing; a process that is killed, a hidden folder that the next
    call replaces.
    """
    final = folder.resolve()
    name = f"{PARTIAL}{final.name}"
    there = final.is_dir() and any(entry.name != name for entry in final.iterdir())
    partial = final / name if there else final.with_name(name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_folder(partial)
        if there:
            for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
                path.replace(final / path.name)
        else:
            partial.replace(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, whatever the locale, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def checksum(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found
