"""One column of a local file, row by row, as the text that it is: no type is guessed, and nothing is left out."""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pi_attention.paths import refused

Rows = Iterator[tuple[str, Any]]
"""Where each row stands, in words ("row 3"), and what its field holds."""


def read_text(path: Path) -> str:
    """A UTF-8 file as it is: line ends are kept, a byte order mark at its start is not.

    Raises:
        ValueError: the file is not UTF-8, and the message names it and the byte; or it cannot be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise refused("data", path, error) from error
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"data={str(path)!r} is UTF-16 by its byte order mark: save it as UTF-8.")
    if raw.count(0) > len(raw) // 4:  # UTF-8 it is, but no text that anybody wrote
        warnings.warn(
            f"data={str(path)!r} is zero in {raw.count(0):,} of {len(raw):,} bytes, as UTF-16 is: save it as UTF-8.",
            stacklevel=2,
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data={str(path)!r} is not UTF-8, the byte {raw[error.start]:#04x} stands at offset {error.start}: "
            "convert the file to UTF-8."
        ) from error


def need_text(value: object, field: str, where: str, name: str) -> str:
    """The value, if it is text that can be written as UTF-8.

    Raises:
        ValueError: it is not; the message names corpus, row, field and type.
    """
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise ValueError(
            f"data={name!r} holds no text in field {field!r} of {where}, but {kind} ({str(value)[:40]}): make it a "
            "string, or set text_field to another field."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"data={name!r} holds a lone surrogate, {value[error.start]!r}, in field {field!r} of {where}, which is no "
            "character: correct or delete it."
        ) from error
    return value


def _need_field(field: str, known: list[str], path: Path) -> None:
    if field not in known:
        raise ValueError(f"data={str(path)!r} has no field {field!r}: set text_field to one of {known}.")


def csv_rows(path: Path, field: str) -> Rows:
    """Fields of a comma-separated file with a header: "NA", "null" and 7 are text; an empty line is an empty row."""
    csv.field_size_limit(sys.maxsize)
    lines = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = next(lines, [])
        if not header:
            raise ValueError(f"data={str(path)!r} has no header in its first line: it must name the fields.")
        _need_field(field, header, path)
        if header.count(field) > 1:
            raise ValueError(f"data={str(path)!r} has {header.count(field)} fields {field!r}: give each its own name.")
        column = header.index(field)
        for number, row in enumerate(lines, 1):
            if row and len(row) != len(header):
                raise ValueError(
                    f"data={str(path)!r} has {len(row)} fields in row {number} (line {lines.line_num}) and "
                    f"{len(header)} in its header: quote fields that hold commas or line ends."
                )
            yield f"row {number}", row[column] if row else ""
    except csv.Error as error:
        raise ValueError(
            f"data={str(path)!r} is no comma-separated file, line {lines.line_num}: {error}. Double the quotes inside "
            "of a quoted field."
        ) from error


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return found


def _parsed(text: str, path: Path, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"data={str(path)!r} holds no JSON in {where} ({error}): write one object a line, or one array of objects."
        ) from error


def json_rows(path: Path, field: str) -> Rows:
    """Fields of JSON objects, one a line or all in one array; lines of blanks alone are no rows."""
    text = read_text(path)
    objects: Iterator[tuple[str, Any]]
    if text.lstrip()[:1] == "[":
        objects = ((f"row {number}", row) for number, row in enumerate(_parsed(text, path, "its array"), 1))
    else:  # str.splitlines would cut at separators that JSON strings may hold
        lines = ((f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        objects = ((where, _parsed(line, path, where)) for where, line in lines)
    for where, row in objects:
        if not isinstance(row, dict):
            raise ValueError(f"data={str(path)!r} holds no object in {where}, but {type(row).__name__}.")
        if field not in row:
            raise ValueError(
                f"data={str(path)!r} has no field {field!r} in {where}: set text_field to one of {list(row)}."
            )
        yield where, row[field]


def parquet_rows(path: Path, field: str) -> Rows:
    """A column of a Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        _need_field(field, names, path)
        if names.count(field) > 1:
            raise ValueError(f"data={str(path)!r} has {names.count(field)} fields {field!r}: give each its own name.")
        number = 0
        for batch in file.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield f"row {number}", value
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data={str(path)!r} cannot be read as Parquet: {error}") from error


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}
