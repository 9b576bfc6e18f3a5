"""Writes text corpora as `data/NAME.parquet` from folders of files.

python -m experiments.corpora data/linux.parquet linux-source-6.12/{kernel,mm,fs} --suffixes .c .h --least 16000
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import tyro
from tyro.conf import Positional

from experiments.duplicates import Seen


@dataclass(frozen=True)
class Corpus:
    """Which files become documents.

    Args:
        out: the parquet file to write, with one column `text`.
        folders: searched with all that is below them, in this order, files by name.
        suffixes: of the files, without a final .gz.
        least: characters of the shortest document.
        join: make a document of successive files, until it has `least` characters.
        tables: keep files of which more than half of the lines begin with the same word, such as registers of a chip.
        alike: leave out a file if more than this share of its runs of five lines stood in earlier files.
        beside: written corpora whose documents count as earlier files.
        every: take each n-th of the documents found.
        level: of zstd, which compresses the file as a whole.
    """

    out: Positional[Path]
    folders: Positional[tuple[Path, ...]]
    suffixes: tuple[str, ...] = (".txt", ".rst", ".md")
    least: int = 1
    join: bool = False
    tables: bool = True
    alike: float = 1.0
    beside: tuple[Path, ...] = ()
    every: int = 1
    level: int = 3
    counts: Counter[str] = field(default_factory=Counter, init=False)

    def files(self) -> Iterator[str]:
        """The texts of the files; what is no UTF-8 in them is replaced."""
        for folder in self.folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"folders={str(folder)!r} is no folder: unpack the corpus there.")
            for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
                packed = path.suffix == ".gz"
                if path.name.removesuffix(".gz").endswith(self.suffixes):
                    content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
                    yield content.decode(errors="replace")

    def kept(self) -> Iterator[str]:
        """The files that are no tables and unlike earlier ones."""
        seen = Seen()
        if self.alike < 1:
            for path in self.beside:
                for text in parquet.read_table(path, columns=["text"])["text"].to_pylist():
                    seen.add(text)
        for text in self.files():
            self.counts["files"] += 1
            if not self.tables and is_table(text):
                self.counts["tables"] += 1
            elif self.alike < 1 and seen.share(text) > self.alike:
                self.counts["alike"] += 1
            else:
                if self.alike < 1:
                    seen.add(text)
                yield text

    def documents(self) -> Iterator[str]:
        """The texts of at least `least` characters."""
        gathered = ""
        for text in self.kept():
            gathered = f"{gathered}\n{text}" if gathered else text
            if len(gathered) >= self.least:
                yield gathered
            if not self.join or len(gathered) >= self.least:
                gathered = ""

    def write(self) -> list[str]:
        """Write the file, whole or not at all, and return its documents."""
        texts = list(self.documents())[:: self.every]
        if not texts:
            raise ValueError(f"folders={[str(f) for f in self.folders]} hold no file of suffixes={self.suffixes}.")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_suffix(".part")
        whole = 2**31 - 1  # one page, so that repetitions are found however far they lie apart
        table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.large_string())})
        parquet.write_table(
            table,
            part,
            compression="zstd",
            compression_level=self.level,
            data_page_size=whole,
            row_group_size=len(texts),
            use_dictionary=False,
            write_statistics=False,
        )
        part.replace(self.out)
        return texts


def is_table(text: str) -> bool:
    """Whether more than half of the lines begin with the same word; a comment's star is none."""
    lines = text.splitlines()
    words = Counter(line.split(maxsplit=1)[0] for line in lines if not line.isspace() and line)
    words.pop("*", None)
    return bool(words) and max(words.values()) > len(lines) / 2


if __name__ == "__main__":
    corpus = tyro.cli(Corpus, description=__doc__)
    written = corpus.write()
    print(f"{corpus.out}: {len(written):,} documents, {sum(map(len, written)):,} characters, {dict(corpus.counts)}")
