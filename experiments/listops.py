"""ListOps by the recipe of the Long Range Arena (arXiv 2011.04006): nested MIN, MAX, MED and SUM modulo 10.

The tree of Nangia & Bowman (arXiv 1804.06028), a value with probability 3/4 below the depth limit, 2 to 10 arguments;
depth at most 10; sequences of 500 to 2000 tokens are kept; the root's value is one of ten classes.
"""

from __future__ import annotations

import random
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from experiments.classification import PAD, classify
from experiments.data import prepared
from experiments.experiment import Experiment, Result, Scale, Settings
from experiments.variants import CLAIMED, ONE_DENSE

END = PAD + 1
OPERATORS = {2: min, 3: max, 4: lambda values: int(statistics.median(values)), 5: lambda values: sum(values) % 10}
DIGIT = 6  # tokens 6 … 15 are the digits
VOCABULARY = 16
SHORTEST, LONGEST, DEPTH, ARGUMENTS, OPERATOR_SHARE = 500, 2000, 10, 10, 0.25


def tree(depth: int, draw: random.Random, longest: int) -> tuple[list[int], int] | None:
    """Tokens and value of a random expression; None when it grows beyond `longest` tokens."""
    if depth >= DEPTH or draw.random() > OPERATOR_SHARE:
        digit = draw.randrange(10)
        return [DIGIT + digit], digit
    operator = draw.choice(list(OPERATORS))
    tokens, values = [operator], []
    for _ in range(draw.randint(2, ARGUMENTS)):
        child = tree(depth + 1, draw, longest)
        if child is None or len(tokens) + len(child[0]) >= longest:
            return None
        tokens += child[0]
        values.append(child[1])
    return [*tokens, END], OPERATORS[operator](values)


def examples(count: int, seed: int, shortest: int = SHORTEST, longest: int = LONGEST) -> tuple[np.ndarray, np.ndarray]:
    """Sequences [count, longest] of uint8, padded on the right, and their classes [count]."""
    draw = random.Random(seed)
    ids, classes = np.zeros((count, longest), np.uint8), np.zeros(count, np.uint8)
    row = 0
    while row < count:
        made = tree(1, draw, longest)
        if made is not None and shortest < len(made[0]) < longest:
            ids[row, : len(made[0])] = made[0]
            classes[row] = made[1]
            row += 1
    return ids, classes


def dataset(settings: Settings, data: Path) -> dict[str, np.ndarray]:
    """Training, validation and test sequences with their classes."""
    sizes = {"training": settings["examples"], "validation": settings["held out"], "test": settings["held out"]}
    longest = settings["context"]
    shortest = longest * SHORTEST // LONGEST

    def make() -> dict[str, np.ndarray]:
        shards = [
            (part, min(250, size - start), 10_000_000 * number + start)
            for number, (part, size) in enumerate(sizes.items())
            for start in range(0, size, 250)
        ]
        jobs = [partial(examples, count, seed, shortest, longest) for _, count, seed in shards]
        if len(jobs) > len(sizes):
            with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
                done = [future.result() for future in [pool.submit(job) for job in jobs]]
        else:
            done = [job() for job in jobs]
        found: dict[str, list[np.ndarray]] = {}
        for (part, _, _), (ids, classes) in zip(shards, done, strict=True):
            found.setdefault(f"{part} ids", []).append(ids)
            found.setdefault(f"{part} classes", []).append(classes)
        return {name: np.concatenate(arrays) for name, arrays in found.items()}

    return prepared(data, f"listops-{longest}-{settings['examples']}-{settings['held out']}", make)


def measure(settings: Settings, data: Path) -> Result:
    """Train a classifier of one variant; the result has accuracies."""
    return classify(settings, dataset(settings, data), vocabulary=VOCABULARY, classes=10)


def cells(scale: Scale) -> list[Settings]:
    """The main variants; the pattern covers every context in four layers."""
    if scale == "laptop":
        return []
    sizes = {"hidden": 128, "layers": 4, "heads": 4, "context": LONGEST, "examples": 32000, "held out": 2000,
             "batch": 32, "steps": 5000, "window": 64, "period": 64, "skips": 16}  # fmt: skip
    if scale == "smoke":
        sizes |= {"hidden": 32, "layers": 2, "heads": 2, "context": 200, "examples": 40, "held out": 20, "batch": 4}
        sizes |= {"steps": 2, "window": 8, "period": 8, "skips": 4}
    return [{"variant": variant, **sizes} for variant in (*CLAIMED, ONE_DENSE)]


EXPERIMENT = Experiment(
    name="listops",
    title="ListOps",
    metric="accuracy",
    better="higher",
    cells=cells,
    measure=measure,
    rates=(1e-3, 3e-3),
    prepare=dataset,
)
