"""Documents of text, from the bundled corpus, local files or a data set on the hub."""

from __future__ import annotations

import json
import lzma
import re
import warnings
from importlib import resources
from pathlib import Path

from pi_attention.data.readers import READERS, need_text, read_text
from pi_attention.paths import need_file, refused, status_of

BUNDLED = "shakespeare"
TEXTS = (".txt", ".md", ".tokens")
"""Endings of files that are one document."""
ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+(:.*)?")
"""OWNER/NAME of a data set, and its configuration."""


def load_documents(data: str, *, split: str = "train", text_field: str = "text") -> list[str]:
    """All documents of a corpus, as strings.

    Args:
        data: "shakespeare" (bundled, public domain), a .txt file (one document), a folder of .txt files (one document
            each), a .jsonl, .csv or .parquet file with a text field, or OWNER/NAME of a data set on the hub, with its
            configuration after a colon ("Salesforce/wikitext:wikitext-103-raw-v1").
        split: of a data set on the hub.
        text_field: the column that holds the text.

    Every row arrives as the text that it is. Empty ones are left out, and a warning says how many; another, how many
    begin with a byte order mark. The mark of a file goes.

    Raises:
        FileNotFoundError, ValueError: there is no such corpus, it has no such field or no text, or a row is no text;
            the message names the file, the row, the field and what is there instead.
    """
    if not data:
        raise ValueError("data is empty: give a text file, a folder, or OWNER/NAME of a data set on the hub.")
    path = Path(data)
    there = data == BUNDLED or status_of("data", path) is not None
    if data == BUNDLED:
        found = _bundled()
    elif path.is_dir():
        found = _folder(path)
    elif there or path.suffix.lower() in (*TEXTS, *READERS) or not ON_THE_HUB.fullmatch(data):
        found = _local_file(path, text_field)
    else:
        found = from_hub(data, split, text_field)
    documents = [document for document in found if document]
    if not documents:
        raise ValueError(f"data={data!r} holds no text: give a file or folder with some.")
    if len(documents) < len(found):
        warnings.warn(
            f"data={data!r}: {len(found) - len(documents):,} of {len(found):,} documents are empty, and left out.",
            stacklevel=2,
        )
    marked = sum(document.startswith("\ufeff") for document in documents)
    if marked:
        warnings.warn(
            f"data={data!r}: {marked:,} of {len(documents):,} documents begin with a byte order mark (U+FEFF), which "
            "is kept as the text that it is: delete it where it was copied from the start of a file.",
            stacklevel=2,
        )
    return documents


def _bundled() -> list[str]:
    file = resources.files("pi_attention.data") / "corpora" / f"{BUNDLED}.jsonl.xz"
    with file.open("rb") as raw, lzma.open(raw, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def _folder(path: Path) -> list[str]:
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise refused("data", path, error) from error
    texts = [entry for entry in entries if entry.suffix.lower() == ".txt"]
    others = [entry.name for entry in entries if entry not in texts]
    if others and not texts:
        raise ValueError(
            f"data={str(path)!r} holds no .txt file, but {len(others):,} other entries, such as {others[0]!r}: name a "
            "file instead, or give each text a name that ends in .txt."
        )
    if others:
        warnings.warn(
            f"data={str(path)!r}: {len(others):,} entries that are no .txt file are left out, such as {others[0]!r}.",
            stacklevel=3,
        )
    for text in texts:
        if not text.is_file():
            raise ValueError(f"data={str(path)!r} holds {text.name!r}, which is no file: rename it, or move it away.")
    return [read_text(text) for text in texts]


def _local_file(path: Path, text_field: str) -> list[str]:
    need_file("data", path, "a text file, a folder, or OWNER/NAME of a data set on the hub")
    ending = path.suffix.lower()
    if ending in TEXTS:
        return [read_text(path)]
    if ending not in READERS:
        known = sorted((*TEXTS, *READERS))
        raise ValueError(f"data={str(path)!r} has an unknown ending {path.suffix!r}: use one of {known}.")
    name = str(path)
    return [need_text(value, text_field, where, name) for where, value in READERS[ending](path, text_field)]


def from_hub(name: str, split: str, text_field: str = "text") -> list[str]:
    """The rows of a split of a data set on the hub, its configuration after a colon; empty ones too.

    Raises:
        ValueError: it cannot be loaded, has no such field, or a row that is no text.
    """
    from datasets import load_dataset

    repository, _, configuration = name.partition(":")
    try:
        dataset = load_dataset(repository, configuration or None, split=split)
    except Exception as error:  # the hub client raises many kinds
        raise ValueError(
            f"data={name!r} is no local file and cannot be loaded from the hub (split {split!r}): {error}"
        ) from error
    return _column(dataset, text_field, name)


def _column(dataset: object, text_field: str, name: str) -> list[str]:
    columns = getattr(dataset, "column_names", [])
    if text_field not in columns:
        raise ValueError(f"data={name!r} has no field {text_field!r}: set text_field to one of {columns}.")
    rows = enumerate(dataset[text_field], 1)  # type: ignore[index]
    return [need_text(value, text_field, f"row {number}", name) for number, value in rows]
