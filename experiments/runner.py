"""Runs rows in the order of importance, each written as soon as it is measured; finished ones are skipped.

Free workers take the first row that can begin and would end in time. A row that fails is named, and stops no other.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from experiments.experiment import Experiment, Scale, Settings
from experiments.rows import RESULTS, Row, load
from experiments.schedule import Queue, ordered, tasks
from experiments.workers import Here, Worker, start


class RowsFailed(RuntimeError):
    """Some rows raised an error; the others are measured."""


def run(
    experiments: Sequence[Experiment],
    scale: Scale,
    data: Path,
    *,
    folder: Path = RESULTS,
    workers: int = 1,
    seeds: int | None = None,
    only: str = "",
    minutes: float = math.inf,
    in_turn: bool = False,
) -> dict[str, list[Row]]:
    """Measure every row that has no result yet, and return the rows of each experiment, older ones too.

    Args:
        experiments: what to run, the most important first.
        scale: of the cells.
        data: folder of the data sets.
        folder: of the result files.
        workers: rows measured at the same time, each in a process; they take the GPUs in turn, if there are several.
        seeds: of each cell; as many as the experiment has when None.
        only: restrict to the cells whose settings, written as JSON, contain this text.
        minutes: no row begins that is expected to end later than this.
        in_turn: take a cell of each experiment in turn, instead of all cells of the first one before the second.

    Raises:
        ValueError: no cell is left.
        RowsFailed: at the end, if rows failed.
    """
    deadline = time.monotonic() + 60 * minutes
    folder.mkdir(exist_ok=True, parents=True)
    cells = {e.name: [cell for cell in e.cells(scale) if only in json.dumps(cell)] for e in experiments}
    if not any(cells.values()):
        names = ", ".join(cells)
        raise ValueError(f"scale={scale!r} with only={only!r} leaves no cell of {names}.")
    for experiment in experiments:
        if experiment.prepare is not None:
            for cell in cells[experiment.name]:
                experiment.prepare(cell, data)
    waiting = ordered([tasks(e, cells[e.name], seeds or e.seeds) for e in experiments], in_turn)
    queue = Queue(waiting, {experiment.name: load(experiment.name, folder) for experiment in experiments})
    crew = start(workers)
    try:
        _work(queue, crew, data, folder, deadline)
    finally:
        for worker in crew:
            worker.close()
    if queue.waiting:
        print(f"{len(queue.waiting)} rows are left, which would have ended too late or lack a rate.", flush=True)
    if queue.failed:
        raise RowsFailed(f"{len(queue.failed)} rows failed: their settings and errors are above.")
    return queue.done


def _work(queue: Queue, crew: Sequence[Here | Worker], data: Path, folder: Path, deadline: float) -> None:
    """Give each free worker the next row, until none is left that would end before the deadline."""
    idle, running = list(crew), dict[Future[Row | None], tuple[Here | Worker, Experiment, Settings]]()
    while True:
        while idle and (taken := queue.take(deadline - time.monotonic())):
            experiment, settings = taken
            worker = idle.pop(0)
            future = worker.submit(experiment.name, experiment.measure, settings, data, folder)
            running[future] = (worker, experiment, settings)
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            worker, experiment, settings = running.pop(future)
            idle.append(worker)
            if not _noted(queue, future, experiment, settings):
                worker.renew()


def _noted(queue: Queue, future: Future[Row | None], experiment: Experiment, settings: Settings) -> bool:
    """Note and print what became of a row; False if it failed."""
    error = future.exception()
    if error is not None:
        queue.failed.append((experiment.name, settings))
        print("".join(traceback.format_exception(error)), file=sys.stderr)
        print(f"{experiment.name} {settings} failed: {error!r}", file=sys.stderr, flush=True)
        return False
    row = future.result()
    if row is None:
        print(experiment.name, settings, "is measured by another process", flush=True)
        return True
    queue.done[experiment.name].append(row)
    shown = {name: value for name, value in row["result"].items() if isinstance(value, int | float)}
    print(experiment.name, row["settings"], shown, f"{row['seconds']} s", flush=True)
    return True
