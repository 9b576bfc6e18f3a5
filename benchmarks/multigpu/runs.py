"""`pi-attention train --parallel` on several GPUs: to the end, resumed on fewer, and with a rank that dies or stops."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from benchmarks.multigpu.rows import Row
from pi_attention.distributed import Layout
from pi_attention.training.metrics import read_metrics

SIZES = "--context 2048 --hidden-size 256 --layers 4 --heads 4 --window 64 --period 64 --skips 16 --warmup-steps 4"
TOY = "--context 128 --hidden-size 32 --layers 2 --heads 4 --window 16 --period 16 --skips 4 --warmup-steps 1"
RHYTHM = "--log-every 1 --eval-blocks 2"
BLOCKS = 4
"""Of a step, in every layout."""


def whole_of(ranks: int) -> Layout:
    """The layout of a run: two sequences at once, each shared by half of the ranks; one where there are fewer."""
    return Layout(dp=2, cp=ranks // 2) if ranks >= 4 else Layout(cp=ranks)


def resumed_of(ranks: int) -> dict[Layout, int]:
    """Layouts of half of the ranks, a quarter …, one, side by side, with the first GPU of each."""
    found, first = {}, 0
    while ranks > 1:
        ranks //= 2
        found[Layout(cp=ranks)] = first
        first += ranks
    return found


def launched(folder: Path, layout: Layout, *options: str, toy: bool, first: int = 0) -> subprocess.Popen[str]:
    """A running `pi-attention train` of a layout, on the GPUs from `first` on."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.ranks)]
    command = [*torchrun, "-m", "pi_attention.cli", "train", "--out", str(folder), "--parallel", str(layout)]
    command += ["--batch-size", str(BLOCKS // layout.dp), *(TOY if toy else SIZES).split()]
    command += [*RHYTHM.split(), *options]
    gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[first:]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    environment.pop("LOCAL_RANK", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def losses_of(folder: Path) -> dict[int, float]:
    """Training losses by step."""
    return {line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}


def finished(process: subprocess.Popen[str]) -> None:
    """Wait for a run.

    Raises:
        RuntimeError: it failed; the message ends as its output does.
    """
    said, _ = process.communicate(timeout=300)
    if process.returncode:
        raise RuntimeError(said[-1500:])


def trained_and_resumed(settings: Row) -> Iterator[Row]:
    """Train on all ranks to the end, then on fewer from the middle: the losses beside one another.

    The settings stand in the rows of the second part alone, so that a run which was not resumed counts as unmeasured.
    """
    steps, half, layout = settings["steps"], settings["steps"] // 2, whole_of(settings["ranks"])
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        rhythm = ["--steps", str(steps), "--save-every", str(half), "--eval-every", str(steps)]
        begun = time.monotonic()
        finished(launched(whole, layout, *rhythm, toy=settings["toy"]))
        want = losses_of(whole)
        about = {"piece": "run", "ranks": settings["ranks"], "layout": str(layout)}
        yield about | {"seconds": time.monotonic() - begun, "losses": want}
        resume = [*rhythm, "--resume", "--checkpoint", str(half)]
        resumed = {}
        for fewer, first in resumed_of(settings["ranks"]).items():
            folder = Path(shutil.copytree(whole, Path(name) / str(fewer)))
            resumed[folder] = fewer, launched(folder, fewer, *resume, toy=settings["toy"], first=first)
        rows = []
        for folder, (fewer, process) in resumed.items():
            finished(process)
            found = losses_of(folder)
            difference = max(abs(found[step] - want[step]) for step in want if step > half)
            rows.append({"layout": str(fewer), "resumed from": str(layout), "at": half, "losses": found})
            agrees = found.keys() == want.keys() and difference < settings["tolerance"]
            rows[-1] |= {"largest difference": difference, "agrees": agrees}
        yield from ({**settings, "piece": "run"} | row for row in rows)


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids by rank of a torchrun."""
    of_rank = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = re.search(r"^PPid:\t(\d+)", (folder / "status").read_text(), re.MULTILINE)
            rank = re.search(r"(?:^|\0)RANK=(\d+)", (folder / "environ").read_text(errors="replace"))
            if rank and parent and int(parent[1]) == process.pid:
                of_rank[int(rank[1])] = int(folder.name)
    return of_rank


def killed(settings: Row) -> Iterator[Row]:
    """Kill or stop rank 1 of a run while it trains: how long the others live on, and whether it is named."""
    how = signal.Signals[settings["signal"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        options = ["--steps", "100000", "--eval-every", "100000", "--save-every", "100000"]
        options += ["--patience", str(settings["patience"])]
        layout = whole_of(settings["ranks"])
        process = launched(folder, layout, *options, toy=settings["toy"])
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and "loss" in metrics.read_text()):
            if process.poll() is not None:
                raise RuntimeError(process.communicate()[0][-1500:])
            time.sleep(0.2)
        of_rank = ranks_of(process)
        os.kill(of_rank[1], how)
        begun = time.monotonic()
        try:
            said, _ = process.communicate(timeout=120)
        finally:
            for pid in of_rank.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        missing = re.search(r"failed, and not all ranks answer.*[Rr]anks? 1\b.*", said)
        agent = re.search(r"rank +: 1 .*\n.*exitcode.*", said)
        yield {
            **settings,
            "piece": "killed",
            "layout": str(layout),
            "others ended after s": time.monotonic() - begun,
            "exit status": process.returncode,
            "named by a rank": missing is not None,
            "named by torchrun": agent is not None,
            "said": (missing or agent).group(0)[:300] if missing or agent else said[-1500:],
        }
