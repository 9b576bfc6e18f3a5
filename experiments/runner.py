"""Runs an experiment row by row: each row is a dict of settings with a result, written as soon as it is measured.

A cell is a row without learning rate and seed. Every cell is first measured at each rate of the experiment's grid with
the first seed; the other seeds follow at the rate that validates best. Finished rows are skipped, so a run resumes.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.rows import RESULTS, Row, append, load

Settings = dict[str, Any]
Result = dict[str, Any]
Scale = Literal["smoke", "laptop", "small"]


@dataclass(frozen=True)
class Experiment:
    """One table of docs/data-language.md or docs/data-tasks.md.

    `cells` gives the settings of a scale: "smoke" shows in seconds on a CPU that the code works, "laptop" takes about
    an hour there, "small" minutes to hours on a GPU; where a scale does not suit, there are no cells. `measure` takes a
    row's settings and the folder of the data, and returns at least "validation" and "test", of which `better` says
    which direction is good. `prepare` readies the data of a cell, once, before the rows run.
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


def run(
    experiment: Experiment,
    scale: Scale,
    data: Path,
    *,
    folder: Path = RESULTS,
    workers: int = 1,
    seeds: int | None = None,
    only: str = "",
) -> list[Row]:
    """Measure every row that has no result yet, and add each to the file of results when it is measured.

    Args:
        experiment: what to run.
        scale: of the cells.
        data: folder of the data sets.
        folder: of the result files.
        workers: rows measured at the same time, each in a process; they take the GPUs in turn, if there are several.
        seeds: of each cell; as many as the experiment has when None.
        only: restrict to the cells whose settings, written as JSON, contain this text.
    """
    folder.mkdir(exist_ok=True, parents=True)
    cells = [cell for cell in experiment.cells(scale) if only in json.dumps(cell)]
    if not cells:
        raise ValueError(f"scale={scale!r} with only={only!r} leaves no cell of {experiment.name}.")
    done = load(experiment.name, folder)
    if experiment.prepare is not None:
        for cell in cells:
            experiment.prepare(cell, data)
    grid = [{**cell, "rate": rate, "seed": 0} for cell in cells for rate in experiment.rates]
    _measure_all(experiment, grid, data, done, folder, workers)
    rest = [
        {**cell, "rate": best_rate(experiment, cell, done), "seed": seed}
        for seed in range(1, seeds or experiment.seeds)
        for cell in cells
    ]
    _measure_all(experiment, rest, data, done, folder, workers)
    return done


def _timed(measure: Callable[[Settings, Path], Result], settings: Settings, data: Path) -> Row:
    begun = time.perf_counter()
    result = measure(settings, data)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"device": device, "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    return {"settings": settings, "result": result, "seconds": round(time.perf_counter() - begun, 2)} | about


def _measure_all(
    experiment: Experiment,
    rows: list[Settings],
    data: Path,
    done: list[Row],
    folder: Path,
    workers: int,
) -> None:
    finished = [row["settings"] for row in done]
    missing = [settings for settings in rows if settings not in finished]
    for row in _completed(experiment.measure, missing, data, workers):
        done.append(row)
        append(experiment.name, row, folder)
        shown = {name: value for name, value in row["result"].items() if isinstance(value, int | float)}
        print(experiment.name, row["settings"], shown, f"{row['seconds']} s", flush=True)


def _see_one_gpu(names: Queue[str]) -> None:
    """In a new process, before it starts CUDA."""
    os.environ["CUDA_VISIBLE_DEVICES"] = names.get()


def _pool(workers: int) -> ProcessPoolExecutor:
    """Processes, of which each sees one of the GPUs."""
    context = get_context("spawn")
    count = torch.cuda.device_count()
    if count < 2:
        return ProcessPoolExecutor(workers, mp_context=context)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    queue = context.Queue()
    for worker in range(workers):
        queue.put(names[worker % count])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_see_one_gpu, initargs=(queue,))


def _completed(
    measure: Callable[[Settings, Path], Result], rows: list[Settings], data: Path, workers: int
) -> Iterator[Row]:
    """Measured rows, as they are finished."""
    if workers == 1:
        for settings in rows:
            yield _timed(measure, settings, data)
        return
    with _pool(workers) as pool:
        pending: set[Future[Row]] = {pool.submit(_timed, measure, settings, data) for settings in rows}
        while pending:
            ready, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ready)
