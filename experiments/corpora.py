"""Writes text corpora as `data/NAME.parquet` from folders of files.

python -m experiments.corpora data/linux.parquet linux-source-6.12/{kernel,mm,fs} --suffixes .c .h --least 16000
"""

from __future__ import annotations

import gzip
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import tyro
from tyro.conf import Positional

from experiments.duplicates import Seen

GROUP = 2**25
"""Characters that are compressed, and later made tokens, together."""


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
        every: take each n-th of the documents found.
        level: of zstd, which compresses a group of documents as a whole.
        most: bytes of the file: no further group, where one as large as the last would make it larger.
    """

    out: Positional[Path]
    folders: Positional[tuple[Path, ...]]
    suffixes: tuple[str, ...] = (".txt", ".rst", ".md")
    least: int = 1
    join: bool = False
    tables: bool = True
    alike: float = 1.0
    every: int = 1
    level: int = 3
    most: float = math.inf
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
        for text in self.files():
            self.counts["files"] += 1
            if not self.tables and is_table(text):
                self.counts["tables"] += 1
            elif self.alike < 1 and seen.knows(text, self.alike):
                self.counts["alike"] += 1
            else:
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

    def groups(self) -> Iterator[list[str]]:
        """Documents of `GROUP` characters together, or a little more."""
        gathered: list[str] = []
        for text in islice(self.documents(), 0, None, self.every):
            gathered.append(text)
            if sum(map(len, gathered)) >= GROUP:
                yield gathered
                gathered = []
        if gathered:
            yield gathered

    def write(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            FileNotFoundError, ValueError: a folder is missing, or no file fits.
        """
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_suffix(".part")
        schema = pyarrow.schema({"text": pyarrow.large_string()})
        whole = {"data_page_size": 2**31 - 1, "use_dictionary": False, "write_statistics": False}  # a group is one page
        with (
            part.open("wb") as file,
            parquet.ParquetWriter(file, schema, compression="zstd", compression_level=self.level, **whole) as writer,
        ):
            last = size = 0
            for texts in self.groups():
                writer.write_table(pyarrow.table({"text": texts}, schema), row_group_size=len(texts))
                self.counts["documents"] += len(texts)
                self.counts["characters"] += sum(map(len, texts))
                print(f"{file.tell():,} bytes, {dict(self.counts)}", flush=True)
                last, size = size, file.tell()
                if 2 * size - last > self.most:
                    break
        if not self.counts["documents"]:
            part.unlink()
            raise ValueError(f"folders={[str(f) for f in self.folders]} hold no file of suffixes={self.suffixes}.")
        part.replace(self.out)


def is_table(text: str) -> bool:
    """Whether more than half of the lines begin with the same word; a comment's star is none."""
    lines = text.splitlines()
    words = Counter(line.split(maxsplit=1)[0] for line in lines if not line.isspace() and line)
    words.pop("*", None)
    return bool(words) and max(words.values()) > len(lines) / 2


if __name__ == "__main__":
    tyro.cli(Corpus, description=__doc__).write()
