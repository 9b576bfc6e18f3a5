"""The terminal as it is: any encoding, any width, user text printed as it was typed, each error one line."""

from __future__ import annotations

import codecs
import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from pi_attention.paths import REMEDIES

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
TRACEBACK = "PI_ATTENTION_TRACEBACK"
"""Environment variable that shows where an error came from."""
ASCII = {"–": "-", "—": "-", "−": "-", "…": "...", "π": "pi", "·": "*", "×": "x", "≥": ">=", "≤": "<=", "→": "->"}
ASCII |= dict.fromkeys("─━╭╮╰╯┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇┳╈╸╺", "-") | dict.fromkeys("│┃", "|")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(ASCII.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


codecs.register_error("pi_attention.ascii", _in_ascii)


def prepare_streams() -> None:
    """Let output write what the terminal's encoding lacks in ASCII, where it would end the process otherwise.

    A stream that was closed before the start swallows what is written to it.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 for as long as we run
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="pi_attention.ascii")


def make_console(*, stderr: bool = False) -> Console:
    """A console that takes no text for markup: a path may hold brackets, a prompt colons."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_line(kind: str, message: object, style: str = "bold red") -> None:
    """`kind: message` on stderr, in one line whatever the width."""
    line = Text.assemble((f"{kind}:", style), " ", " ".join(str(message).split()))
    make_console(stderr=True).print(line, soft_wrap=True)


def is_full_disk(error: BaseException) -> bool:
    """Whether the disk had no room, as libraries tell with errors of their own kinds."""
    return "No space left on device" in str(error)


def in_words(error: BaseException) -> str:
    """An error of the system, of a library or of our own, as a sentence."""
    if isinstance(error, OSError) and error.strerror is not None:
        names = [repr(name) for name in (error.filename, error.filename2) if name is not None]
        remedy = f": {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""
        where = f"{' and '.join(names)}: " if names else ""
        return f"{where}{error.strerror}{remedy}."
    if is_full_disk(error) and not isinstance(error, OSError):
        return f"the disk is full ({error}): {REMEDIES[errno.ENOSPC]}."
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return f"the memory does not suffice ({type(error).__name__}): take a smaller model, context or batch."
    return str(error) or type(error).__name__


def as_typed(name: str, text: str) -> str:
    """An argument that is text, read as UTF-8 where the locale is another: its bytes are what was typed.

    Raises:
        ValueError: the bytes are not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{name}={text!r} is not UTF-8: give text of the terminal's encoding.") from error


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Show what is told to the user as `warning: …`, without a line of source code."""
    usual = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category is UserWarning and file is None:
            print_line("warning", message, "bold yellow")
        else:
            usual(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def close_quietly() -> None:
    """After the reader of a pipe has gone: what is still buffered goes nowhere, without another error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
