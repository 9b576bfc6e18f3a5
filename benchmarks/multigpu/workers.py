"""A group of processes that measures cases one after another; out of memory, it ends and harms no other."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.multigpu import operator, runs, step
from benchmarks.multigpu.rows import OUT_OF_MEMORY, Row

RANKED = {"operator": operator.work, "step": step.work}
"""What every rank of a process group does."""
LAUNCHING = {"run": runs.trained_and_resumed, "killed": runs.killed}
"""What one process does, which starts torchrun."""


@dataclass(frozen=True)
class Case:
    """What one group of processes measures, in turn.

    Args:
        piece: a name of RANKED or LAUNCHING.
        ranks: GPUs that it takes.
        batch: settings, each what a row says of itself.
        limit: seconds after which one of them is ended.
    """

    piece: str
    ranks: int
    batch: tuple[Row, ...]
    limit: float = 120.0


Search = Generator[Case, Row | None, None]
"""Cases, each chosen by the last row of the one before; None where that has none."""


def _measure(case: Case, rank: int, folder: str, dry: bool, pipe: Connection) -> None:
    if case.piece in LAUNCHING:
        for settings in case.batch:
            for row in LAUNCHING[case.piece](settings):
                pipe.send(row)
            pipe.send({"through": settings})
        return
    device = torch.device("cpu") if dry else torch.device("cuda", rank)
    if not dry:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if dry else "nccl",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=case.ranks,
        timeout=timedelta(seconds=case.limit),
    )
    for settings in case.batch:
        for row in RANKED[case.piece](settings, device):
            if rank == 0:
                pipe.send(row)
        gc.collect()  # models refer to themselves
        if not dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        if rank == 0:
            pipe.send({"through": settings})


def work(case: Case, rank: int, gpus: list[int], folder: str, dry: bool, pipe: Connection) -> None:
    """The life of one process; rows, and how it failed, go into the pipe."""
    os.setsid()  # with what it starts, it is ended as one
    visible = "" if dry else ",".join(map(str, gpus))
    os.environ |= {"CUDA_VISIBLE_DEVICES": visible, "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        _measure(case, rank, folder, dry, pipe)
        pipe.close()
        os._exit(0)  # no teardown: the next case waits for the GPU
    except BaseException as error:
        said = traceback.format_exc()
        full = isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY in str(error)
        pipe.send({"failed": OUT_OF_MEMORY if full else said[-1500:]})
        os._exit(1)


@dataclass
class Group:
    """The running processes of a case.

    Args:
        case: that they measure.
        search: that it came from.
        gpus: that they have.
        last: the last row.
        through: how many settings of the batch are done.
    """

    case: Case
    search: Search
    gpus: list[int]
    last: Row | None = None
    through: int = 0
    deadline: float = 0.0
    folder: Any = field(default_factory=lambda: tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    processes: list[Any] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)

    def start(self, context: Any, dry: bool) -> None:
        """Start a process for each rank, or the one that launches them."""
        self.deadline = time.monotonic() + self.case.limit
        for rank in range(1 if self.case.piece in LAUNCHING else self.case.ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(self.case, rank, self.gpus, self.folder.name, dry, theirs))
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def news(self) -> tuple[list[Row], str | None]:
        """Rows that have come, and why the group has failed, if it has."""
        rows: list[Row] = []
        failures: list[str] = []
        for pipe in list(self.pipes):
            try:
                while pipe.poll():
                    said = pipe.recv()
                    if "failed" in said:
                        failures.append(said["failed"])
                    elif "through" in said:
                        self.through, self.deadline = self.through + 1, time.monotonic() + self.case.limit
                    else:
                        rows.append(said)
            except (EOFError, OSError):
                self.pipes.remove(pipe)
        if time.monotonic() > self.deadline:
            failures.append("time limit")
        elif not self.pipes and any(process.exitcode for process in self.processes):
            failures.append("a process was ended from outside")
        return rows, OUT_OF_MEMORY if OUT_OF_MEMORY in failures else next(iter(failures), None)

    def end(self) -> None:
        """Kill what still runs, torchrun gently, so that it ends its own."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes:
                if process.is_alive():
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, how)
            until = time.monotonic() + 5
            for process in self.processes:
                process.join(max(0.0, until - time.monotonic()))
        self.folder.cleanup()
