"""Two more tasks in the manner of the Long Range Arena (arXiv 2011.04006): reviews as bytes, images as pixels.

Text: is a film review of IMDb positive, by its bytes. Image: Fashion-MNIST, a pixel a token (the arena has CIFAR-10).
"""

from __future__ import annotations

import csv
import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.classification import classify
from experiments.data import need, prepared
from experiments.experiment import Experiment, Result, Scale, Settings
from experiments.variants import BASELINE, CLAIMED, COORDINATED_HEADS, ONE_DENSE

VOCABULARY = 257  # padding, then bytes
CLASSES = {"text": 2, "image": 10}


def reviews(data: Path, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes plus one [N, length], zeros after the end, and whether a review is positive [N]; without duplicates."""
    path = need(data / "reviews.csv", "a CSV file with the columns text, label (1 is positive) and source (imdb)")
    with path.open(newline="", encoding="utf-8") as lines:
        found = {row["text"]: row["label"] for row in csv.DictReader(lines) if row["source"] == "imdb"}
    ids = np.zeros((len(found), length), np.uint16)
    for row, text in zip(ids, found, strict=True):
        known = np.frombuffer(text.encode()[:length], np.uint8)
        row[: len(known)] = known.astype(np.uint16) + 1
    return ids, np.array([sentiment == "1" for sentiment in found.values()], np.uint8)


def images(data: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels plus one [N, 784] and classes [N] of Fashion-MNIST's "train" or "t10k" files."""

    def read(name: str, header: int) -> np.ndarray:
        path = need(data / "fashion-mnist" / f"{part}-{name}-ubyte.gz", "take Fashion-MNIST's four files")
        return np.frombuffer(gzip.decompress(path.read_bytes())[header:], np.uint8)

    return read("images-idx3", 16).reshape(-1, 784).astype(np.uint16) + 1, read("labels-idx1", 8)


def dataset(settings: Settings, data: Path) -> dict[str, np.ndarray]:
    """Training, validation and test sequences with their classes, drawn once."""
    counts = {"training": settings["examples"], "validation": settings["held out"], "test": settings["held out"]}

    def make() -> dict[str, np.ndarray]:
        if settings["task"] == "text":
            sources = [reviews(data, settings["context"])] * 3
        else:
            sources = [images(data, "train")] * 2 + [images(data, "t10k")]
        order = np.random.default_rng(0).permutation(len(sources[0][1]))
        found, start = {}, 0
        for (part, count), (ids, classes) in zip(counts.items(), sources, strict=True):
            rows = np.arange(count) if ids is not sources[0][0] else order[start : start + count]
            start += count
            if len(rows) < count or count > len(ids):
                raise ValueError(f"examples={counts} are more than the {len(ids)} that the {part} part is drawn from.")
            found |= {f"{part} ids": ids[rows], f"{part} classes": classes[rows]}
        return found

    return prepared(data, f"lra-{settings['task']}-{settings['context']}-{'-'.join(map(str, counts.values()))}", make)


def measure(settings: Settings, data: Path) -> Result:
    """Train a classifier of one variant on one task; the result has accuracies."""
    return classify(settings, dataset(settings, data), vocabulary=VOCABULARY, classes=CLASSES[settings["task"]])


def cells(scale: Scale) -> list[Settings]:
    """The main variants, coordinated heads and a dense layer among windows, on both tasks."""
    if scale == "laptop":
        return []
    sizes = {"hidden": 128, "layers": 4, "heads": 4}
    tasks = {
        "text": {"context": 2048, "window": 64, "period": 64, "skips": 16, "batch": 32, "steps": 2000,
                 "examples": 18000, "held out": 3000},
        "image": {"context": 784, "window": 28, "period": 28, "skips": 14, "batch": 64, "steps": 2000,
                  "examples": 20000, "held out": 5000},
    }  # fmt: skip
    if scale == "smoke":
        sizes = {"hidden": 16, "layers": 1, "heads": 2, "batch": 2, "steps": 2, "examples": 8, "held out": 2}
        sizes |= {"window": 28, "period": 28, "skips": 4}
        tasks = {"text": {"context": 64}, "image": {"context": 784}}
    return [
        {"task": task, "variant": variant, **sizes, **more}
        for task, more in tasks.items()
        for variant in (*CLAIMED, ONE_DENSE)
    ]


def pooled_cells(scale: Scale) -> list[Settings]:
    """The classifier reads the mean over all tokens, so that no pattern has to gather the input in one of them."""
    variants = ("dense", BASELINE, "pi", COORDINATED_HEADS)
    return [{**cell, "pooling": "mean"} for cell in cells(scale) if cell["variant"] in variants]


EXPERIMENT = Experiment(
    name="lra",
    title="Long Range Arena: text and image",
    metric="accuracy",
    better="higher",
    cells=cells,
    measure=measure,
    rates=(3e-4, 1e-3, 3e-3),
    prepare=dataset,
)

POOLED_EXPERIMENT = replace(
    EXPERIMENT,
    name="lra_pooled",
    title="Long Range Arena: text and image, by the mean of the tokens",
    cells=pooled_cells,
)
