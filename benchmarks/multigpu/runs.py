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
from pi_attention.training.metrics import read_metrics

SIZES = "--context 2048 --hidden-size 256 --layers 4 --heads 4 --window 64 --period 64 --skips 16 --warmup-steps 4"
TOY = "--context 128 --hidden-size 32 --layers 2 --heads 4 --window 16 --period 16 --skips 4 --warmup-steps 1"
RHYTHM = "--log-every 1 --eval-blocks 2"
WHOLE = "dp=2,cp=2"
RESUMED = {"cp=2": 0, "dp=1": 2}
"""Layouts at the same time, with the first GPU of each."""
BATCHES = {WHOLE: 2, "cp=2": 4, "dp=1": 4}
"""Blocks of a step on each group, so that a step has four blocks in every layout."""


def launched(folder: Path, layout: str, *options: str, toy: bool, first: int = 0) -> subprocess.Popen[str]:
    """A running `pi-attention train` of a layout, on the GPUs from `first` on."""
    ranks = 1
    for size in re.findall(r"\d+", layout):
        ranks *= int(size)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*torchrun, "-m", "pi_attention.cli", "train", "--out", str(folder), "--parallel", layout]
    command += ["--batch-size", str(BATCHES[layout]), *(TOY if toy else SIZES).split(), *RHYTHM.split(), *options]
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
    """Train on four ranks to the end, then on two and on one from the middle: the losses beside one another."""
    steps, half = settings["steps"], settings["steps"] // 2
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        rhythm = ["--steps", str(steps), "--save-every", str(half), "--eval-every", str(steps)]
        begun = time.monotonic()
        finished(launched(whole, WHOLE, *rhythm, toy=settings["toy"]))
        want = losses_of(whole)
        yield {**settings, "piece": "run", "layout": WHOLE, "seconds": time.monotonic() - begun, "losses": want}
        resume = [*rhythm, "--resume", "--checkpoint", str(half)]
        resumed = {}
        for layout, first in RESUMED.items():
            folder = Path(shutil.copytree(whole, Path(name) / layout))
            resumed[folder] = layout, launched(folder, layout, *resume, toy=settings["toy"], first=first)
        for folder, (layout, process) in resumed.items():
            finished(process)
            found = losses_of(folder)
            difference = max(abs(found[step] - want[step]) for step in want if step > half)
            row = {**settings, "piece": "run", "layout": layout, "resumed from": WHOLE, "at": half, "losses": found}
            agrees = found.keys() == want.keys() and difference < settings["tolerance"]
            yield row | {"largest difference": difference, "agrees": agrees}


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids by rank of a torchrun."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    of_rank = {}
    for pid in map(int, found.stdout.split()):
        with suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            of_rank |= {int(v.partition("=")[2]): pid for v in variables if v.startswith("RANK=")}
    return of_rank


def killed(settings: Row) -> Iterator[Row]:
    """Kill or stop rank 1 of a run while it trains: how long the others live on, and whether it is named."""
    how = signal.Signals[settings["signal"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        options = ["--steps", "100000", "--eval-every", "100000", "--save-every", "100000"]
        options += ["--patience", str(settings["patience"])]
        process = launched(folder, WHOLE, *options, toy=settings["toy"])
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
            "layout": WHOLE,
            "others ended after s": time.monotonic() - begun,
            "exit status": process.returncode,
            "named by a rank": missing is not None,
            "named by torchrun": agent is not None,
            "said": (missing or agent).group(0)[:300] if missing or agent else said[-1500:],
        }
