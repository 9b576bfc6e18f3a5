"""`pi-attention train --parallel` under torchrun: layouts train the same, resume each other, name a dead rank."""

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

from pi_attention.distributed import Layout
from pi_attention.models import PiForCausalLM
from pi_attention.training.config import TrainConfig, save_yaml
from pi_attention.training.parallel import blocks_of_step, train_over_ranks
from pi_attention.training.train import SETTINGS as SETTINGS_FILE
from pi_attention.training.train import train

SETTINGS = """
--context 128 --hidden-size 32 --layers 2 --heads 4 --window 16 --period 16 --skips 4 --steps 4 --eval-every 4
--save-every 2 --log-every 1 --eval-blocks 2 --warmup-steps 1 --learning-rate 0.003
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    words = [f"word{i % 97} and{i % 13} " for i in range(3000)]
    (folder / "text.txt").write_text("".join(words))
    return folder


def launched(folder, out, ranks, *options):
    """A running `pi-attention train` on so many ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [
        *launch,
        "-m",
        "pi_attention.cli",
        "train",
        "--data",
        str(folder / "text.txt"),
        "--out",
        str(folder / out),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *SETTINGS, *options], env=environment, **pipes)


def losses(folder, out):
    lines = [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def trained(folder, out, ranks, *options):
    process = launched(folder, out, ranks, *options)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    return losses(folder, out)


def test_layouts_train_the_same_and_resume_each_other(folder):
    alone = trained(folder, "alone", 1, "--parallel", "dp=1", "--batch-size", "4")
    assert len(alone) == 4 and alone[4] < alone[1]
    refused = launched(folder, "spread", 1, "--parallel", "dp=2")
    assert "needs 2 ranks" in refused.communicate(timeout=120)[0] and not (folder / "spread").exists()
    spread = trained(folder, "spread", 4, "--parallel", "dp=2,cp=2", "--batch-size", "2", "--zero", "2")
    assert spread == pytest.approx(alone, abs=1e-5)
    shutil.rmtree(folder / "spread" / "sharded-4")  # as if it had been killed after the checkpoint of step 2
    resumed = trained(folder, "spread", 4, "--resume", "--parallel", "tp=2,cp=2", "--batch-size", "4")
    assert resumed == pytest.approx(alone, abs=1e-5)
    models = [PiForCausalLM.from_pretrained(folder / out / "model") for out in ("alone", "spread")]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_rank_that_dies_or_stops_ends_the_others_and_is_named(folder, how):
    out = f"ended-{how.name}"
    process = launched(folder, out, 2, "--parallel", "cp=2", "--steps", "100000", "--patience", "5")
    metrics = folder / out / "metrics.jsonl"
    deadline = time.time() + 120
    while not (metrics.exists() and "loss" in metrics.read_text()):
        assert time.time() < deadline and process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.2)
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


def test_a_run_is_not_resumed_in_the_other_mode(tmp_path):
    config = TrainConfig()
    config.run.out, config.run.parallel = tmp_path, "dp=2"
    save_yaml(config, tmp_path / SETTINGS_FILE)
    config.run.resume = True
    with pytest.raises(ValueError, match="resume it under torchrun"):
        train(config, None)
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match="resume it without --parallel"):
        train_over_ranks(config, None)


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
    monkeypatch.delenv("RANK", raising=False)
    config = TrainConfig()
    config.run.out, config.run.parallel = tmp_path / "run", "dp=2"
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        train_over_ranks(config, None)
