"""Text corpora of the experiments as tokens: files of `data/`, or data sets of the hub."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from experiments.data import need, prepared
from pi_attention.data.corpus import from_hub, load_documents

Documents = list[np.ndarray]


def file_name(name: str) -> str:
    """Of what is prepared from a corpus."""
    return name.replace("/", "--").replace(":", "--")


def hub(name: str, split: str) -> list[str]:
    """The documents of a split of a data set on the hub, its configuration after a colon.

    WikiText's rows are lines, which become articles again; a title is " = Title = ". Its configuration is WikiText-103
    with the words of the benchmark, "wikitext-103-v1", unless another is named.
    """
    repository, _, _ = name.partition(":")
    if not repository.endswith("/wikitext"):
        return from_hub(name, split)
    articles: list[list[str]] = [[]]
    for line in from_hub(name if ":" in name else f"{name}:wikitext-103-v1", split):
        words = line.split()
        if len(words) > 2 and words[0] == words[-1] == "=" != words[1]:
            articles.append([])
        articles[-1].append(line.rstrip("\n") + "\n")
    return ["".join(lines) for lines in articles if lines]


def corpus(name: str, data: Path) -> list[str]:
    """The documents of a text corpus: the bundled "shakespeare", or `data/NAME.parquet` with a column `text`.

    Of a data set on the hub, whose name holds a slash, those of its training split; of "A+B", those of A and of B.
    """
    if "+" in name:
        return [text for part in name.split("+") for text in corpus(part, data)]
    if "/" in name:
        return hub(name, "train")
    if name == "shakespeare":
        return list(load_documents(name))
    path = need(data / f"{name}.parquet", f"write the documents of the corpus {name!r} to it, one a row")
    return parquet.read_table(path, columns=["text"])["text"].to_pylist()


@cache
def bpe(name: str, vocabulary: int, data: Path) -> Tokenizer:
    """Byte-level BPE of `vocabulary` entries (0 ends a document), trained on every tenth document of a corpus."""
    path = data / "prepared" / f"{file_name(name)}-{vocabulary}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True, parents=True)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<end>"], initial_alphabet=alphabet)
        tokenizer.train_from_iterator(corpus(name, data)[::10], trainer)
        tokenizer.save(str(path))
    return Tokenizer.from_file(str(path))


BATCH = 512
"""Documents that are encoded at a time, on all cores."""


def encoded(texts: list[str], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The tokens of texts, one after the other, and where each ends; what a tokenizer puts before texts is left out."""
    kind = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    found = [
        np.array(encoding.ids, kind)
        for start in range(0, len(texts), BATCH)
        for encoding in tokenizer.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)
    ]
    return {"tokens": np.concatenate(found), "ends": np.cumsum([len(ids) for ids in found])}


def _pieces(arrays: dict[str, np.ndarray]) -> Documents:
    """The documents of what `encoded` returns."""
    return np.split(arrays["tokens"], arrays["ends"][:-1])


def split(arrays: dict[str, np.ndarray]) -> dict[str, Documents]:
    """Training, validation and test documents of what `encoded` returns, 90 : 5 : 5."""
    place = np.array([9, 9, 9, 9, 9, 9, 9, 9, 9, 1, 9, 9, 9, 9, 9, 9, 9, 9, 9, 2])
    parts = {"training": 9, "validation": 1, "test": 2}
    found = _pieces(arrays)
    return {part: [p for i, p in enumerate(found) if place[i % 20] == number] for part, number in parts.items()}


@cache
def documents(name: str, vocabulary: int, data: Path) -> dict[str, Documents]:
    """Tokens of the training, validation and test documents, as uint16.

    Those are the splits of a data set on the hub; of another corpus 90 : 5 : 5, drawn by document.
    """
    file = f"{file_name(name)}-{vocabulary}"

    def arrays(file: str, texts: Callable[[], list[str]]) -> dict[str, np.ndarray]:
        return prepared(data, file, lambda: encoded(texts(), bpe(name, vocabulary, data)))

    if "/" in name:
        splits = {"training": "train", "validation": "validation", "test": "test"}
        return {part: _pieces(arrays(f"{file}-{split}", partial(hub, name, split))) for part, split in splits.items()}

    def shuffled() -> list[str]:
        texts = corpus(name, data)
        random.Random(0).shuffle(texts)
        return texts

    return split(arrays(file, shuffled))


def windows(pieces: Documents, length: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches [batch, length] of random windows inside single documents, each start equally likely."""
    long = [piece for piece in pieces if len(piece) >= length]
    if not long:
        raise ValueError(f"no document has context={length} tokens: take a shorter context or longer documents.")
    weights = torch.tensor([len(piece) - length + 1 for piece in long], dtype=torch.float64)
    while True:
        chosen = torch.multinomial(weights, batch, replacement=True, generator=generator).tolist()
        starts = [int(torch.randint(len(long[i]) - length + 1, (), generator=generator)) for i in chosen]
        rows = [long[i][start : start + length] for i, start in zip(chosen, starts, strict=True)]
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def blocks(pieces: Documents, length: int, most: int) -> tuple[Tensor, list[int]]:
    """The first `most` blocks [N, length] of single documents, at most four of each; and the documents' numbers.

    Raises:
        ValueError: no document is as long as a block.
    """
    found = [
        (piece[start : start + length], number)
        for number, piece in enumerate(pieces)
        for start in range(0, min(len(piece), 4 * length) - length + 1, length)
    ][:most]
    if not found:
        raise ValueError(f"no held-out document has context={length} tokens: take a shorter context.")
    return torch.from_numpy(np.stack([block for block, _ in found]).astype(np.int64)), [number for _, number in found]
