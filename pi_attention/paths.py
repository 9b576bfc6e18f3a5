"""Paths that a user names: each refusal names the argument, the value and the remedy, and comes before any work."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

from pi_attention.files import PARTIAL

LONGEST_NAME = 255 - len(PARTIAL)
"""Bytes of a file's name that leave room for the one under which it is written first."""
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
"""What a path may name that is no file."""
REMEDIES = {
    errno.ENAMETOOLONG: "take a shorter one",
    errno.ELOOP: "the links lead in a circle, name the file itself",
    errno.EACCES: "change its permissions, or choose another one",
    errno.ENOSPC: "free room on the disk, then do it again",
}


def shown(path: object) -> str:
    """A path as an error shows it: quoted, and its middle left out where it is very long."""
    text = str(path)
    return repr(text) if len(text) <= 120 else f"{text[:60] + '…' + text[-40:]!r} of {len(text):,} letters"


def refused(name: str, path: object, error: OSError) -> ValueError:
    """The system's refusal of a path, as an error that names the argument and the remedy."""
    remedy = REMEDIES.get(error.errno or 0, "choose another one")
    where = f" at {shown(error.filename)}" if error.filename not in (None, str(path)) else ""
    return ValueError(f"{name}={shown(path)} cannot be used{where}, {(error.strerror or '').lower()}: {remedy}.")


def status_of(name: str, path: Path) -> os.stat_result | None:
    """What the system knows of a path, links followed; None where there is nothing.

    Raises:
        ValueError: it cannot be the path of anything, or must not be looked at; `name` is the argument's.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise refused(name, path, error) from error
    except ValueError as error:
        raise ValueError(f"{name}={shown(path)} holds a null byte, which no path does: correct it.") from error


def need_file(name: str, path: Path, what: str) -> None:
    """Raise unless the path is a file that can be read; `what` is wanted, in words.

    Raises:
        FileNotFoundError: there is nothing, or a folder, a pipe or a device. A pipe is not opened, so none can hang.
        ValueError: it may not be read.
    """
    status = status_of(name, path)
    if status is None:
        raise FileNotFoundError(f"{name}={shown(path)} does not exist: give {what}.")
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(f"{name}={shown(path)} is no file, but {_kind(status)}: give {what}.")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{name}={shown(path)} may not be read: change its permissions, or give {what}.")


def need_new_file(name: str, path: Path) -> None:
    """Raise ValueError unless a file can be written under this path, in place of another file or of none."""
    need_folder(name, path.parent)
    status = status_of(name, path)
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{name}={shown(path)} is no file, but {_kind(status)}: choose another one.")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise ValueError(f"{name}={shown(path)} has a name of more than {LONGEST_NAME} bytes: take a shorter one.")


def need_folder(name: str, path: Path) -> None:
    """Raise ValueError unless files can be written into the folder, which need not exist; `name` is the argument's."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}={str(path)!r} has letters that the locale cannot express: set PYTHONUTF8=1, or choose another one."
        ) from error
    there = next((folder for folder in (path, *path.parents) if _exists(name, folder)), Path())
    if not there.is_dir():
        raise ValueError(f"{name}={shown(path)} cannot be a folder, {shown(there)} is a file: choose another one.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name}={shown(path)} cannot be written, {shown(there)} is read-only: choose another one.")
    try:
        with tempfile.TemporaryFile(dir=there):  # for what permissions do not say, such as /proc
            pass
    except OSError as error:
        raise ValueError(
            f"{name}={shown(path)} cannot be written, {shown(there)} takes no files: choose another one."
        ) from error


def _kind(status: os.stat_result) -> str:
    return KINDS[stat.S_IFMT(status.st_mode)]


def _exists(name: str, path: Path) -> bool:
    return status_of(name, path) is not None or path.is_symlink()
