"""Processes that measure rows, each on one of the GPUs; one that a row broke is replaced."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from experiments.rows import Row, append, claim, load

Measure = Callable[[dict[str, Any], Path], dict[str, Any]]


def timed(measure: Measure, settings: dict[str, Any], data: Path) -> Row:
    """The row of these settings, with what it was measured on."""
    begun = time.perf_counter()
    result = measure(settings, data)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"device": device, "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    return {"settings": settings, "result": result, "seconds": round(time.perf_counter() - begun, 2)} | about


def measured(name: str, measure: Measure, settings: dict[str, Any], data: Path, folder: Path) -> Row | None:
    """The row, added to the results of experiment `name`; None while another process measures it."""
    with claim(name, settings, folder) as free:
        if not free:
            return None
        for row in load(name, folder):  # another run may have finished it since this one began
            if row["settings"] == settings:
                return row
        row = timed(measure, settings, data)
        append(name, row, folder)
        return row


class Here:
    """Measures in this process."""

    def submit(self, *arguments: Any) -> Future[Row | None]:
        """What `measured` returns or raises, once it has done so."""
        future: Future[Row | None] = Future()
        try:
            future.set_result(measured(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def renew(self) -> None:
        """Nothing: this process goes on."""

    close = renew


class Worker:
    """A process that measures one row after the other, and sees one GPU where there are several."""

    def __init__(self, gpu: str | None) -> None:
        self.gpu = gpu
        self.pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        seen = {} if self.gpu is None else {"initializer": _see, "initargs": (self.gpu,)}
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"), **seen)

    def submit(self, *arguments: Any) -> Future[Row | None]:
        """What `measured` will return or raise."""
        return self.pool.submit(measured, *arguments)

    def renew(self) -> None:
        """Another process in place of one that may be broken: no call to CUDA works after some errors of a kernel."""
        self.pool.shutdown(wait=False)
        self.pool = self._start()

    def close(self) -> None:
        """End the process, without waiting for a row that it still measures."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def _see(gpu: str) -> None:
    """In a new process, before it starts CUDA."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def start(workers: int) -> list[Here] | list[Worker]:
    """One process for each worker, which take the GPUs in turn; this process for a single one."""
    if workers == 1:
        return [Here()]
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return [Worker(names[worker % count] if count > 1 else None) for worker in range(workers)]
