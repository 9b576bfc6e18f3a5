"""What an experiment is: cells of settings, and how a row of them is measured.

A cell is a row without learning rate and seed. Every cell is first measured at each rate of the experiment's grid with
the first seed; the other seeds follow at the rate that validates best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from experiments.rows import Row

Settings = dict[str, Any]
Result = dict[str, Any]
Scale = Literal["smoke", "laptop", "small"]


@dataclass(frozen=True)
class Experiment:
    """One table of docs/data-language.md or docs/data-tasks.md.

    `cells` gives the settings of a scale: "smoke" shows in seconds on a CPU that the code works, "laptop" takes about
    an hour there, "small" minutes to hours on a GPU; where a scale does not suit, there are no cells. `measure` takes a
    row's settings and the folder of the data, and returns at least "validation" and "test", of which `better` says
    which direction is good. `prepare` readies the data of a cell, once, before the rows run. `seconds` guesses how long
    a row takes on a GPU, where none of its size has been measured.
    """

    name: str
    title: str
    metric: str
    better: Literal["lower", "higher"]
    cells: Callable[[Scale], list[Settings]]
    measure: Callable[[Settings, Path], Result]
    rates: tuple[float, ...]
    seeds: int = 3
    prepare: Callable[[Settings, Path], None] | None = None
    seconds: Callable[[Settings], float] | None = None


def on_dataset(experiment: Experiment, dataset: str) -> Experiment:
    """The experiment with a data set of the hub in place of its corpora.

    Raises:
        ValueError: it does not train on a corpus of text.
    """
    if not any("corpus" in cell for cell in experiment.cells("smoke")):
        raise ValueError(f"dataset={dataset!r}: {experiment.name} trains on no corpus of text; leave dataset out.")
    if "/" not in dataset:
        raise ValueError(f"dataset={dataset!r} is no name on the hub: give OWNER/NAME or OWNER/NAME:CONFIGURATION.")
    return replace(experiment, cells=lambda scale: [{**cell, "corpus": dataset} for cell in experiment.cells(scale)])


def without(settings: Settings, *names: str) -> Settings:
    """Settings less some of them."""
    return {name: value for name, value in settings.items() if name not in names}


def best_rate(experiment: Experiment, cell: Settings, rows: Iterable[Row]) -> float:
    """The learning rate whose run with the first seed validates best."""
    sign = 1 if experiment.better == "lower" else -1

    def loss(row: Row) -> float:
        value = sign * row["result"]["validation"]
        return math.inf if math.isnan(value) else value

    of_cell = [row for row in rows if without(row["settings"], "rate", "seed") == cell and row["settings"]["seed"] == 0]
    return min(of_cell, key=loss)["settings"]["rate"]
