"""Values of a settings file against the kinds that the settings are declared to have."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path", tuple: "a list"}


def as_kind(name: str, value: Any, kind: Any) -> Any:
    """The value as a setting of this kind takes it.

    Args:
        name: of the setting, for the message.
        value: from YAML.
        kind: an annotation: int, float, bool, str, Path, Literal[…], tuple[…, ...] or a union of these with None.

    Raises:
        ValueError: it is of another kind.
    """
    if get_origin(kind) in (Union, types.UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        kind = next(member for member in get_args(kind) if member is not type(None))
    if get_origin(kind) is Literal:
        if value not in get_args(kind) or isinstance(value, bool):
            raise ValueError(f"{name} must be one of {list(get_args(kind))}, got {value!r}.")
        return value
    if get_origin(kind) is tuple:
        entries = value if isinstance(value, list | tuple) else [value]
        return tuple(as_kind(f"{name}[{i}]", entry, get_args(kind)[0]) for i, entry in enumerate(entries))
    if kind is float and isinstance(value, str):  # YAML takes 3e-3, without a point, for text
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        if not value:
            raise ValueError(f"{name} is empty: give a path, '.' for the current folder.")
        return Path(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} must be {WORDS.get(kind, kind)}, got {value!r}.")
    return value
