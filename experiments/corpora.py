"""Writes text corpora as `data/NAME.parquet` from folders of files.

python -m experiments.corpora data/linux.parquet linux-source-6.12/{kernel,mm,fs} --suffixes .c .h --least 16000
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import tyro
from tyro.conf import Positional


@dataclass(frozen=True)
class Corpus:
    """Which files become documents.

    Args:
        out: the parquet file to write, with one column `text`.
        folders: searched with all that is below them, in this order, files by name.
        suffixes: of the files, without a final .gz.
        least: characters of the shortest document.
        every: take each n-th of the documents found.
    """

    out: Positional[Path]
    folders: Positional[tuple[Path, ...]]
    suffixes: tuple[str, ...] = (".txt", ".rst", ".md")
    least: int = 1
    every: int = 1

    def documents(self) -> Iterator[str]:
        """The texts; what is no UTF-8 in them is replaced."""
        for folder in self.folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"folders={str(folder)!r} is no folder: unpack the corpus there.")
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                packed = path.suffix == ".gz"
                if path.name.removesuffix(".gz").endswith(self.suffixes):
                    content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
                    text = content.decode(errors="replace")
                    if len(text) >= self.least:
                        yield text

    def write(self) -> list[str]:
        """Write the file, whole or not at all, and return its documents."""
        texts = list(self.documents())[:: self.every]
        if not texts:
            raise ValueError(f"folders={[str(f) for f in self.folders]} hold no file of suffixes={self.suffixes}.")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_suffix(".part")
        parquet.write_table(pyarrow.table({"text": texts}), part)
        part.replace(self.out)
        return texts


if __name__ == "__main__":
    corpus = tyro.cli(Corpus, description=__doc__)
    written = corpus.write()
    print(f"{corpus.out}: {len(written):,} documents, {sum(map(len, written)):,} characters")
