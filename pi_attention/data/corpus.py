"""Documents of text, from the bundled corpus, local files or a data set on the hub."""

from __future__ import annotations

import json
import lzma
from importlib import resources
from pathlib import Path

BUNDLED = "shakespeare"
READERS = {".txt": "text", ".md": "text", ".tokens": "text"}
READERS |= {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_documents(data: str, *, split: str = "train", text_field: str = "text") -> list[str]:
    """All documents of a corpus, as strings.

    Args:
        data: "shakespeare" (bundled, public domain), a .txt file (one document), a folder of .txt files (one document
            each), a .jsonl, .csv or .parquet file with a text field, or the name of a data set on the hub, with its
            configuration after a colon ("Salesforce/wikitext:wikitext-103-raw-v1").
        split: of a data set on the hub.
        text_field: the column that holds the text.

    Raises:
        FileNotFoundError, ValueError: there is no such corpus, or it has no such field or no text.
    """
    path = Path(data)
    if data == BUNDLED:
        documents = _bundled()
    elif path.is_dir():
        documents = [file.read_text(encoding="utf-8") for file in sorted(path.glob("*.txt"))]
    elif path.suffix in READERS or path.exists():
        documents = _local_file(path, text_field)
    else:
        documents = from_hub(data, split, text_field)
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"data={data!r} holds no text.")
    return documents


def _bundled() -> list[str]:
    file = resources.files("pi_attention.data") / "corpora" / f"{BUNDLED}.jsonl.xz"
    with file.open("rb") as raw, lzma.open(raw, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def _local_file(path: Path, text_field: str) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"data={str(path)!r} does not exist: give a text file, a folder, or a data set's name.")
    kind = READERS.get(path.suffix)
    if kind is None:
        raise ValueError(f"data={str(path)!r} has an unknown ending {path.suffix!r}: use one of {sorted(READERS)}.")
    if kind == "text":
        return [path.read_text(encoding="utf-8")]
    from datasets import load_dataset

    return _column(load_dataset(kind, data_files=str(path), split="train"), text_field, str(path))


def from_hub(name: str, split: str, text_field: str = "text") -> list[str]:
    """The rows of a split of a data set on the hub, its configuration after a colon; empty ones too.

    Raises:
        ValueError: it cannot be loaded, or has no such field.
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
    return list(dataset[text_field])  # type: ignore[index]
