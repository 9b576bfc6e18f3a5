"""kill -9 at random moments, also in the middle of every write: a run resumes to the same weights, bit for bit."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TINY = """
--steps 8 --save-every 2 --hidden-size 16 --layers 1 --heads 2 --window 4 --period 4 --skips 2 --context 32
--eval-every 4 --eval-blocks 1 --log-every 1 --warmup-steps 1
""".split()  # noqa: SIM905
FILES = ("train.yaml", "metrics.jsonl", "summary.json", "sample.txt", "loss.png", "pattern.png", "gate.png")
processes = multiprocessing.get_context("forkserver")  # which has imported everything, so that a run starts at once
processes.set_forkserver_preload(["pi_attention.training.train", "pi_attention.cli.main", "test_killed_runs"])


def train(arguments, die_at):
    """A command in a process of its own, which kills itself at its write number `die_at`."""
    torch.set_num_threads(1)
    if die_at is not None:
        _die_at_write(die_at)
    from rich.console import Console

    from pi_attention.cli.main import parse

    raise SystemExit(parse(arguments).execute(Console(quiet=True)))


def _die_at_write(number):
    """kill -9 before the flush, the renaming or the removal number `number` of files and folders."""
    import shutil

    left = [number]

    def counted(usual):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return usual(*args, **kwargs)

        return call

    os.fsync, Path.replace, shutil.rmtree = counted(os.fsync), counted(Path.replace), counted(shutil.rmtree)
    Path.write_text = counted(Path.write_text)


def run(arguments, seconds=None, die_at=None):
    """Start, kill after some seconds where given, and say how it ended."""
    process = processes.Process(target=train, args=(arguments, die_at))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbs: its folder, the arguments of its kind, and how long it takes."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "t.txt").write_text("".join(f"{i} and {i * i}. " for i in range(200)))
    arguments = ["train", "--data", str(folder / "t.txt"), *TINY]
    assert run([*arguments, "--out", str(folder / "warm-up"), "--steps", "2"]) == 0
    begun = time.monotonic()
    assert run([*arguments, "--out", str(folder / "whole")]) == 0
    return folder / "whole", arguments, time.monotonic() - begun


def check_resumes(whole, out, draw):
    folder, arguments, taken = whole
    kills = draw.choice([1, 1, 2, 3])
    for attempt in range(kills + 1):
        last = attempt == kills
        seconds, die_at = (None, None) if last else (draw.uniform(0, taken), None)
        if not last and draw.random() < 0.5:
            seconds, die_at = None, draw.randrange(150)
        started = (out / "train.yaml").exists()
        command = ["train", "--out", str(out), "--resume"] if started else [*arguments, "--out", str(out)]
        code = run(command, seconds, die_at)
        assert code in (0, -signal.SIGKILL), (code, seconds, die_at)
        if code == 0:
            break
    assert code == 0
    want, got = (load_file(path / "model" / "model.safetensors") for path in (folder, out))
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    assert [name for name in FILES if not (out / name).stat().st_size] == []
    steps = [[json.loads(line)["step"] for line in (path / "metrics.jsonl").open()] for path in (folder, out)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_run_resumes_bit_for_bit(seed, whole, tmp_path):
    check_resumes(whole, tmp_path / "run", random.Random(seed))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(100, 150))
def test_a_run_killed_at_very_many_moments_resumes_bit_for_bit(seed, whole, tmp_path):
    check_resumes(whole, tmp_path / "run", random.Random(seed))
