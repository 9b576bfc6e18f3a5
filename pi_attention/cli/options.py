"""Commands and options by their names: the nearest one for a mistyped one, and tyro's errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tyro

SIDES = "│| "
RULES = "╭╮╰╯─+- "


def nearest(name: str, known: Iterable[str]) -> str:
    """`: did you mean …?` for the most similar known name, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f": did you mean {found[0]}?" if found else "."


def option_names(kind: Any) -> Iterator[str]:
    """The options of a command, `--learning-rate`, those of its parts among them."""
    for field in dataclasses.fields(kind):
        part = field.default_factory
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            yield from option_names(part)
            continue
        name = field.name.replace("_", "-")
        yield f"--{name}"
        if isinstance(field.default, bool):
            yield f"--no-{name}"


def check_options(command: str, kind: Any, arguments: list[str]) -> None:
    """Raise ValueError for an option that the command has not; the message names the nearest one."""
    known = [*option_names(kind), "--help", "--config"]
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if argument == "--" or argument.startswith("--tyro"):
            return
        if argument.startswith("--") and name not in known:
            raise ValueError(
                f"{argument.partition('=')[0]!r} is no option of pi-attention {command}{nearest(name, known)} "
                f"pi-attention {command} --help lists them all."
            )


REGISTRY = tyro.constructors.ConstructorRegistry()
"""How arguments become settings, where tyro would do it otherwise."""


def _as_path(words: list[str]) -> Path:
    if not words[0]:
        raise ValueError("the path is empty; '.' is the current folder")
    return Path(words[0])


def _as_path_or_none(words: list[str]) -> Path | None:
    return None if words == ["None"] else _as_path(words)


@REGISTRY.primitive_rule
def _paths(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Paths, but for an empty one, which pathlib takes for the current folder."""
    if info.type not in (Path, Path | None):
        return None
    optional = info.type is not Path
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_as_path_or_none if optional else _as_path,
        is_instance=lambda value: isinstance(value, Path) or (optional and value is None),
        str_from_instance=lambda path: [str(path)],
    )


def take_config(arguments: list[str]) -> tuple[list[str], Path | None]:
    """Split `--config FILE` off the arguments."""
    rest, config, left = [], None, iter(arguments)
    for argument in left:
        if argument != "--config" and not argument.startswith("--config="):
            rest.append(argument)
            continue
        if config is not None:
            raise ValueError("--config is given twice: put the settings into one file.")
        path = argument.partition("=")[2] if "=" in argument else next(left, "")
        if not path:
            raise ValueError("--config needs the path of a YAML file.")
        config = Path(path)
    return rest, config


@contextlib.contextmanager
def short_usage(commands: Iterable[str]) -> Iterator[None]:
    """Print `COMMAND` in the usage, where tyro lists all commands in a line of more than 80 columns."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        print(printed.getvalue().replace("{" + ",".join(commands) + "}", "COMMAND", 1), end="")


@contextlib.contextmanager
def parser_errors_in_one_line(command: str) -> Iterator[None]:
    """Raise ValueError with the first words of the box that tyro prints before it exits.

    Raises:
        ValueError: the arguments cannot be parsed.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), patch.dict(os.environ, COLUMNS="10000", NO_COLOR="1"):
            yield
    except SystemExit as stopped:
        if not stopped.code:
            raise
        lines = [line.strip(SIDES) for line in printed.getvalue().splitlines()[1:]]  # without the title
        first = next(group for ruled, group in groupby(lines, key=lambda line: not line.strip(RULES)) if not ruled)
        words = " ".join(" ".join(first).split()).rstrip(".")
        raise ValueError(f"{words}. pi-attention {command} --help explains.") from None
