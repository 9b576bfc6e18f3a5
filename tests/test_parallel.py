"""`pi-attention train` on one process and under torchrun: layouts train the same, resume each other, save on Ctrl-C."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from pi_attention.distributed import Layout
from pi_attention.models import PiForCausalLM
from pi_attention.training.checkpoints import last_checkpoint
from pi_attention.training.config import TrainConfig, save_yaml
from pi_attention.training.resume import settings_to_resume
from pi_attention.training.run import blocks_of_step
from pi_attention.training.train import train

SETTINGS = """
--context 128 --hidden-size 32 --layers 2 --heads 4 --window 16 --period 16 --skips 4 --gate --steps 6
--eval-every 6 --save-every 2 --log-every 1 --eval-blocks 2 --warmup-steps 1 --learning-rate 0.003
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    words = [f"word{i % 97} and{i % 13} " for i in range(3000)]
    (folder / "text.txt").write_text("".join(words))
    return folder


def launched(folder, out, ranks, *options):
    """A running `pi-attention train`: one process, or so many ranks of torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launch, "-m", "pi_attention.cli", "train", "--out", str(folder / out)]
    if "--resume" not in options:
        command += ["--data", str(folder / "text.txt"), *SETTINGS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *options], env=environment, **pipes)


FIGURES = ("loss", "eval_loss", "grad_norm")


def figures(folder, out):
    lines = [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): line[name] for line in lines for name in FIGURES if name in line}


def trained(folder, out, ranks, *options):
    process = launched(folder, out, ranks, *options)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    return figures(folder, out)


@pytest.fixture(scope="module")
def alone(folder):
    """An uninterrupted run of one process."""
    found = trained(folder, "alone", 0, "--batch-size", "4")
    assert len(found) == 13 and found[6, "loss"] < found[1, "loss"]
    return found


def cut_back(folder, source, out, step):
    """A copy of a run as if it had been killed after the checkpoint of a step."""
    shutil.copytree(folder / source, folder / out)
    for path in (folder / out).glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    (folder / out / "summary.json").unlink()
    shutil.rmtree(folder / out / "model")


def same_weights(folder, one, other):
    models = [PiForCausalLM.from_pretrained(folder / out / "model") for out in (one, other)]
    for x, y in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_a_run_goes_from_one_process_to_two_and_back(folder, alone):
    trained(folder, "there", 0, "--batch-size", "4", "--keep-checkpoints", "9")
    cut_back(folder, "there", "middle", 2)
    assert trained(folder, "middle", 2, "--resume", "--parallel", "cp=2") == pytest.approx(alone, abs=1e-5)
    cut_back(folder, "middle", "back", 4)
    assert (folder / "back" / "checkpoint-4" / "__1_0.distcp").exists()
    assert trained(folder, "back", 0, "--resume") == pytest.approx(alone, abs=1e-5)
    same_weights(folder, "alone", "back")


def test_layouts_train_the_same_and_resume_each_other(folder, alone):
    refused = launched(folder, "spread", 1, "--parallel", "dp=2")
    assert "needs 2 ranks" in refused.communicate(timeout=120)[0] and not (folder / "spread").exists()
    spread = trained(folder, "spread", 4, "--parallel", "dp=2,cp=2", "--batch-size", "2", "--zero", "2")
    assert spread == pytest.approx(alone, abs=1e-5)
    cut_back(folder, "spread", "again", 4)
    resumed = trained(folder, "again", 4, "--resume", "--parallel", "tp=2,cp=2")
    assert resumed == pytest.approx(alone, abs=1e-5)
    same_weights(folder, "alone", "again")


def wait_for_metrics(folder, out, process):
    metrics, deadline = folder / out / "metrics.jsonl", time.time() + 120
    while not (metrics.exists() and "loss" in metrics.read_text()):
        assert time.time() < deadline and process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.2)


def test_ctrl_c_saves_under_torchrun_and_one_process_goes_on(folder):
    """Ranks of torchrun without --parallel are data-parallel groups."""
    endless = ["--steps", "100000", "--save-every", "100000"]
    process = launched(folder, "stopped", 2, *endless)
    wait_for_metrics(folder, "stopped", process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=90)
    step = int(re.search(r"Interrupted at step (\d+), saved. Go on: pi-attention train --out \S+ --resume", said)[1])
    assert last_checkpoint(folder / "stopped").name == f"checkpoint-{step}" and not (folder / "stopped/model").exists()
    assert max(number for number, _ in figures(folder, "stopped")) == step
    process = launched(folder, "stopped", 0, "--resume")
    while max(number for number, _ in figures(folder, "stopped")) < step + 2:
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert "Interrupted at step" in process.communicate(timeout=90)[0] and process.returncode == 130
    kept = yaml.safe_load((folder / "stopped" / "train.yaml").read_text())
    assert (kept["optimizer"]["batch_size"], kept["optimizer"]["gradient_accumulation"]) == (1, 2)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_rank_that_dies_or_stops_ends_the_others_and_is_named(folder, how):
    out = f"ended-{how.name}"
    process = launched(folder, out, 2, "--parallel", "cp=2", "--steps", "100000", "--patience", "5")
    wait_for_metrics(folder, out, process)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    of_rank = {}
    for pid in map(int, found.stdout.split()):
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        of_rank |= {int(v.partition("=")[2]): pid for v in variables if v.startswith("RANK=")}
    os.kill(of_rank[1], how)
    try:
        said, _ = process.communicate(timeout=90)
    finally:
        with suppress(ProcessLookupError):
            os.kill(of_rank[1], signal.SIGKILL)
    assert process.returncode != 0
    if how == signal.SIGSTOP:
        assert re.search(r"rank 0 failed, and not all ranks answer.*[Rr]anks? 1\b", said), said[-3000:]
    else:
        assert re.search(r"rank +: 1 ", said) and "SIGKILL" in said, said[-3000:]


def run_of(tmp_path, batch_size, gradient_accumulation, parallel):
    config = TrainConfig()
    config.run.out, config.run.parallel = tmp_path, parallel
    config.optimizer.batch_size, config.optimizer.gradient_accumulation = batch_size, gradient_accumulation
    save_yaml(config, tmp_path / "train.yaml")


@pytest.mark.parametrize(
    ("run", "parallel", "asked", "divided"),
    [
        ((4, 1, ""), "", (1, 1), (4, 1)),
        ((4, 1, ""), "cp=2", (1, 1), (4, 1)),
        ((4, 1, ""), "dp=2", (1, 1), (2, 1)),
        ((2, 3, "dp=2"), "", (1, 1), (2, 6)),
        ((2, 3, "dp=2"), "dp=4", (3, 1), (3, 1)),
        ((2, 3, "dp=2"), "cp=4", (1, 4), (3, 4)),
    ],
)
def test_a_step_keeps_its_blocks_at_every_layout(run, parallel, asked, divided, tmp_path):
    run_of(tmp_path, *run)
    given = TrainConfig()
    given.run.out, given.run.parallel = tmp_path, parallel
    given.optimizer.batch_size, given.optimizer.gradient_accumulation = asked
    found = settings_to_resume(given).optimizer
    assert (found.batch_size, found.gradient_accumulation) == divided


@pytest.mark.parametrize(("parallel", "batch_size"), [("dp=3", 1), ("", 3), ("dp=8", 1)])
def test_blocks_that_a_layout_cannot_divide_are_named(parallel, batch_size, tmp_path):
    run_of(tmp_path, 4, 1, "")
    given = TrainConfig()
    given.run.out, given.run.parallel, given.optimizer.batch_size = tmp_path, parallel, batch_size
    with pytest.raises(ValueError, match=r"a step of the run has 4 blocks, but .* cannot"):
        settings_to_resume(given)


def test_every_layout_sees_the_same_blocks():
    assert sorted(blocks_of_step(0, 3, 6, 7) + blocks_of_step(1, 3, 6, 7)) == list(range(6))
    assert blocks_of_step(0, 6, 6, 7) == blocks_of_step(0, 3, 6, 7) + blocks_of_step(1, 3, 6, 7)
    assert blocks_of_step(2, 3, 6, 7) != blocks_of_step(0, 3, 6, 7)  # the next epoch


def test_wrong_layouts_are_named(monkeypatch, tmp_path):
    assert Layout.parse("cp=4,dp=2") == Layout(dp=2, cp=4)
    with pytest.raises(ValueError, match="'pp=2' is not one of"):
        Layout.parse("dp=2,pp=2")
    with pytest.raises(ValueError, match="dp must be at least 1"):
        Layout.parse("dp=0")
    with pytest.raises(ValueError, match="names dp twice"):
        Layout.parse("dp=2,cp=2,dp=4")
    with pytest.raises(ValueError, match="'dp=²' is not one of"):
        Layout.parse("dp=²")
    monkeypatch.delenv("RANK", raising=False)
    config = TrainConfig()
    config.run.out, config.run.parallel = tmp_path / "run", "dp=2"
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        train(config, None)
    assert not (tmp_path / "run").exists()
