"""The main job from the command line, on a tiny model: training, interruption, resuming, evaluating, generating."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from pi_attention import PiPattern
from pi_attention.cli.main import main, parse
from pi_attention.models import PiConfig
from pi_attention.training.checkpoints import last_checkpoint
from pi_attention.training.progress import ProgressBar

TINY = [
    "--hidden-size", "32", "--layers", "2", "--heads", "2", "--window", "8", "--period", "8", "--skips", "3", "--gate",
    "--context", "128", "--eval-every", "5", "--eval-blocks", "2", "--save-every", "4", "--log-every", "2",
    "--warmup-steps", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{i} times {j} is {i * j}.\n" for i in range(60) for j in range(20)))
    return str(file)


def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pi_attention.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=check, env=environment())


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    result = run("train", "--data", corpus, "--out", str(out), "--steps", "12", *TINY)
    return out, result.stdout + result.stderr


def test_a_run_folder_holds_everything(finished):
    out, printed = finished
    names = ["loss.png", "pattern.png", "gate.png", "sample.txt", "summary.json", "train.yaml", "metrics.jsonl"]
    assert [name for name in names if not (out / name).stat().st_size] == []
    assert list((out / "runs").rglob("events*"))
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [float(line["loss"]) for line in metrics if "loss" in line]
    assert losses[-1] < losses[0]
    assert [line["step"] for line in metrics if "eval_loss" in line] == [5, 10, 12]
    steps = [line["step"] for line in metrics]
    assert len(steps) == len(set(steps)) and "loss" in metrics[-1]  # a line a step, the last step's loss in it
    assert {"grad_norm", "learning_rate", "epoch"} <= metrics[0].keys()
    assert "tokens/s" in printed and "s left" in printed
    parameters = sum(weight.numel() for weight in weights(out).values())
    assert f"{parameters:,} parameters" in printed  # as a number of millions this model had none
    assert "maximum length" not in printed  # the sample stays within a short context
    assert len((out / "sample.txt").read_text()) <= 128
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]


def test_a_loss_by_slices_trains_the_same(finished, corpus, tmp_path):
    run("train", "--data", corpus, "--out", str(tmp_path / "sliced"), "--steps", "12", "--loss-slice", "50", *TINY)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (finished[0], tmp_path / "sliced")]
    for one, other in zip(*lines, strict=True):
        one, other = json.loads(one), json.loads(other)
        for name in ("loss", "eval_loss"):
            assert (name in one) == (name in other)
            assert abs(float(one.get(name, 0)) - float(other.get(name, 0))) < 1e-3


def test_a_finished_run_is_not_trained_further_and_a_lost_report_is_made_again(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    before = weights(out)
    assert "nothing is left to do" in " ".join(run("train", "--out", str(out), "--resume").stdout.split())
    (out / "summary.json").unlink()
    shutil.rmtree(out / "model")
    run("train", "--out", str(out), "--resume")
    assert (out / "summary.json").exists() and last_checkpoint(out).name == "checkpoint-12"
    assert all(torch.equal(before[name], value) for name, value in weights(out).items())


def test_a_resumed_run_keeps_its_settings(finished):
    for options, words in (
        (["--steps", "80"], "steps=80 differs from 12"),
        (["--heads", "8"], "heads=8 differs from 2"),
    ):
        result = run("train", "--out", str(finished[0]), "--resume", *options, check=False)
        assert result.returncode == 2 and words in " ".join(result.stderr.split())


def test_text_too_short_for_a_validation_block_is_named(corpus, tmp_path):
    result = run("train", "--data", corpus, "--out", str(tmp_path), "--context", "8192", check=False)
    assert result.returncode == 2 and "the validation part of data=" in " ".join(result.stderr.split())


def test_a_finished_run_is_not_overwritten(finished, corpus):
    result = run("train", "--data", corpus, "--out", str(finished[0]), "--steps", "2", *TINY, check=False)
    assert result.returncode == 2
    assert "holds a run already" in result.stderr


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "timed out"
        time.sleep(0.05)


def test_a_run_that_goes_on_refuses_another_text(finished, corpus, tmp_path):
    out, text = tmp_path / "changed", tmp_path / "text.txt"
    shutil.copytree(finished[0], out)
    (out / "summary.json").unlink()
    settings = yaml.safe_load((out / "train.yaml").read_text())
    settings["data"]["data"] = str(text)
    (out / "train.yaml").write_text(yaml.safe_dump(settings))
    text.write_text(Path(corpus).read_text().replace("7 times", "8 times"))
    failed = run("train", "--out", str(out), "--resume", check=False)
    assert failed.returncode == 2 and "gives other training tokens than the run" in " ".join(failed.stderr.split())
    text.write_text(Path(corpus).read_text().replace("times", "by"))
    failed = run("eval", str(out), check=False)
    assert failed.returncode == 2 and "other validation tokens" in " ".join(failed.stderr.split())
    text.write_text("short")
    failed = run("eval", str(out), "--data", str(text), check=False)
    assert failed.returncode == 2 and f"data='{text}': the text has" in " ".join(failed.stderr.split())
    text.write_text(Path(corpus).read_text())
    assert "validation loss" in run("train", "--out", str(out), "--resume").stdout


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_a_stopped_run_resumes_to_the_same_weights(stop, finished, corpus, tmp_path):
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "pi_attention.cli", "train", "--data", corpus, "--out", str(out), "--steps", "12"]
    narrow = environment() | {"COLUMNS": "40"}
    process = subprocess.Popen([*command, *TINY], env=narrow, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: last_checkpoint(out) is not None or process.poll() is not None)
    process.send_signal(stop)
    printed, _ = process.communicate(timeout=120)
    if stop == signal.SIGINT:
        assert process.returncode == 130 and f"Go on: pi-attention train --out {out} --resume\n" in printed
    assert not (out / "model").exists()
    assert "missing keys" not in run("train", "--out", str(out), "--resume").stderr
    for name, tensor in weights(finished[0]).items():
        assert torch.equal(tensor, weights(out)[name]), name
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_byte_pairs_are_trained_once_and_kept_with_the_run(corpus, tmp_path):
    out = tmp_path / "pairs"
    run("train", "--data", corpus, "--out", str(out), "--steps", "12", "--tokenizer", "bpe:512", *TINY)
    tokens, whole = (out / "tokenizer" / "tokenizer.json").read_bytes(), weights(out)
    assert (out / "model" / "tokenizer.json").read_bytes() == tokens
    assert whole["model.embed_tokens.weight"].shape[0] == len(json.loads(tokens)["model"]["vocab"]) <= 512
    for name in ("model", "checkpoint-12"):
        shutil.rmtree(out / name)
    kept = json.loads(tokens)
    kept["model"]["merges"].pop()  # a resumed run trains none anew: it would show
    (out / "tokenizer" / "tokenizer.json").write_text(json.dumps(kept))
    failed = run("train", "--out", str(out), "--resume", check=False)
    assert failed.returncode == 2 and "other training tokens" in " ".join(failed.stderr.split())
    (out / "text.json").unlink()  # as earlier versions left a run
    run("train", "--out", str(out), "--resume")
    assert json.loads((out / "model" / "tokenizer.json").read_bytes())["model"]["merges"] == kept["model"]["merges"]
    (out / "tokenizer" / "tokenizer.json").write_bytes(tokens)
    for name in ("model", "checkpoint-12"):
        shutil.rmtree(out / name)
    run("train", "--out", str(out), "--resume")
    for name, tensor in whole.items():
        assert torch.equal(tensor, weights(out)[name]), name
    assert "bits per byte" in run("eval", str(out)).stdout
    run("generate", str(out), "--max-new-tokens", "5")


@pytest.mark.parametrize("name", ["bpe:", "bpe:511", "bpe:65537", "bpe:-600", "bpe:1e3", "bpe:²"])
def test_a_vocabulary_that_byte_pairs_cannot_have_is_named(name, tmp_path):
    result = run("train", "--out", str(tmp_path / "run"), "--tokenizer", name, check=False)
    assert result.returncode == 2 and "a vocabulary from 512 to 65536" in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_whole_or_absent(monkeypatch, corpus, tmp_path):
    """Stop a save at every file that it writes: the newest visible checkpoint always loads."""
    import pi_attention.training.checkpoints as checkpoints

    out = tmp_path / "run"

    class Killed(BaseException):
        pass

    def killed(folder):
        raise Killed

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints.files, "sync_folder", killed)
    with pytest.raises(Killed):
        parse(["train", "--data", corpus, "--out", str(out), "--steps", "12", *TINY]).execute(_console())
    assert last_checkpoint(out) is None
    assert (out / checkpoints.PARTIAL).exists()
    monkeypatch.undo()
    assert parse(["train", "--out", str(out), "--resume"]).execute(_console()) == 0
    assert not (out / checkpoints.PARTIAL).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
def test_a_checkpoint_without_room_is_told_and_the_run_goes_on_later(finished, corpus, tmp_path):
    """Files of more than 64 KiB fail as on a full disk."""
    out = tmp_path / "run"
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)); "
    code += "from pi_attention.cli.main import main; main()"
    command = [sys.executable, "-c", code, "train", "--data", corpus, "--out", str(out), "--steps", "12", *TINY]
    told = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert told.returncode == 2 and "Traceback" not in told.stderr
    assert f"out={str(out)!r}: the checkpoint of step 4 cannot be written" in told.stderr
    assert "free room, then go on with --resume" in told.stderr
    assert not (out / ".partial").exists()
    run("train", "--out", str(out), "--resume")
    assert all(torch.equal(weights(finished[0])[name], value) for name, value in weights(out).items())


def _console():
    from rich.console import Console

    return Console(quiet=True)


def test_evaluation(finished, corpus):
    out, _ = finished
    printed = run("eval", str(out)).stdout
    assert re.match(r"evaluating \d+ blocks of 128 tokens\n", printed)
    result = json.loads((out / "eval.json").read_text())
    assert f"{result['bits_per_byte']:.4f} bits per byte" in printed
    assert (out / "loss_by_position.png").exists()
    other = run("eval", str(out), "--data", corpus, "--context", "64", "--out", str(out / "other")).stdout
    assert "perplexity" in other
    assert json.loads((out / "other" / "eval.json").read_text())["context"] == 64


def test_generation_streams_and_reports_the_cache(finished):
    done = run("generate", str(finished[0]), "--prompt", "7 times", "--max-new-tokens", "30")
    assert done.stdout.startswith("7 times") and "cache" not in done.stdout
    assert "30 tokens, " in done.stderr and "never more than 24 tokens" in done.stderr
    out = finished[0]
    own = run("generate", str(out), "--max-new-tokens", "1").stdout
    assert own.startswith((out / "sample.txt").read_text()[:60])  # the bytes that its sample began with


def test_inspection(finished, tmp_path):
    printed = run("inspect", str(finished[0])).stdout
    assert "the last 8 tokens, 3 keys at multiples of 8" in printed
    assert (
        "mean over 4,096 tokens" in run("inspect", str(finished[0]), "--context", "4096", "--out", str(tmp_path)).stdout
    )
    flags = ["--window", "4", "--period", "5", "7", "--heads", "2", "--layers", "3", "--html", "--out", str(tmp_path)]
    printed = run("inspect", *flags).stdout
    assert "multiples of 5, 7 (one period a head) beyond" in printed and "through 3 layers" in printed
    for name in ("pattern.png", "receptive_field.png", "explorer.html"):
        assert (tmp_path / name).stat().st_size > 1000
    printed = run("inspect", str(finished[0]), "--empirical", "--tokens", "100", "--out", str(tmp_path)).stdout
    assert "non-zero exactly on the" in printed
    assert (tmp_path / "influence.png").exists() and (tmp_path / "attention_by_lag.png").exists()


def test_heads_of_a_run_take_phases(corpus, tmp_path):
    out = tmp_path / "phases"
    flags = ["--heads", "4", "--period", "4", "--phase", "0", "1", "2", "3", "--no-gate"]
    run("train", "--data", corpus, "--out", str(out), "--steps", "4", *TINY, *flags)
    assert yaml.safe_load((out / "train.yaml").read_text())["model"]["phase"] == [0, 1, 2, 3]
    assert PiConfig.from_pretrained(out / "model").patterns() == [PiPattern(8, 4, 3, phase=(0, 1, 2, 3))] * 2
    assert "nothing is left to do" in " ".join(run("train", "--out", str(out), "--resume").stdout.split())
    result = run("train", "--out", str(out), "--resume", "--phase", "1", check=False)
    assert result.returncode == 2 and "phase=[1] differs from [0, 1, 2, 3]" in " ".join(result.stderr.split())
    assert "multiples of 4 plus 0, 1, 2, 3 (one phase a head) beyond" in run("inspect", str(out)).stdout
    assert "7 times" in run("generate", str(out), "--prompt", "7 times", "--max-new-tokens", "30").stdout


def test_settings_from_a_file_and_flags(tmp_path, corpus):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"model": {"window": 32, "period": 16}, "run": {"out": "somewhere"}}))
    command = parse(["train", "--config", str(file), "--window", "48"])
    assert (command.model.window, command.model.period, command.run.out) == (48, (16,), Path("somewhere"))
    assert command.model.skips == 64 and command.model.pattern().phase == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--window", "0"], "window must be at least 1"),
        (["train", "--period", "3", "4", "5"], "3 entries"),
        (["train", "--period", "2", "--phase", "0", "1"], "phase has 2 entries but there are 4 query heads"),
        (["train", "--period", "2", "--phase", "0", "1", "2", "3"], "phase[2]=2 must be smaller than the period"),
        (["train", "--heads", "3"], "must divide"),
        (["train", "--heads", "4", "--hidden-size", "36"], "must be even"),
        (["train", "--steps", "0"], "steps must be"),
        (["train", "--loss-slice", "0"], "loss_slice must be at least 1"),
        (["train", "--data", "missing.txt"], "missing.txt"),
        (["train", "--resume", "--out", "nothing-here"], "no run to resume"),
        (["train", "--config", "missing.yaml"], "missing.yaml"),
        (["--config", "x.yaml"], "command"),
        (["eval", "nothing-here"], "no model"),
        (["inspect", "--period", "3", "4"], "2 entries"),
        (["plan", "--context", "64", "--head-dim", "7", "--out", "p.yaml"], "head_dim=7 must be even"),
        (
            ["inspect", "--period", "128", "--phase", "128"],
            "phase=128 must be smaller than the period of its head, 128",
        ),
    ],
)
def test_errors_are_one_clear_line(arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pi-attention", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert words in printed and "Traceback" not in printed


def test_unknown_settings_in_a_file_are_named(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: {windows: 3}")
    with pytest.raises(ValueError, match=r"unknown setting 'model.windows'"):
        parse(["train", "--config", str(file)])


def test_the_command_without_its_packages_says_which_is_missing():
    code = "import sys; sys.modules['tyro'] = None; from pi_attention.cli.__main__ import command; command()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "pi-attention needs the package tyro: pip install 'pi-attention[train]'"


def test_time_left_counts_by_recent_steps(monkeypatch):
    printed = io.StringIO()
    now = 0.0
    monkeypatch.setattr("pi_attention.training.progress.time.perf_counter", lambda: now)
    bar = ProgressBar(steps=40, done=0, tokens_per_step=100, console=Console(file=printed))
    for seconds in (60.0, *[1.0] * 8, *[2.0] * 21):  # the first compiles, the last ones run on a busier machine
        bar.step_begins()
        now += seconds
        bar.step_ends()
        now += 30.0  # a validation is no part of a step
    bar.show({"loss": 1.5})
    assert "step 30/40  loss 1.500" in printed.getvalue() and "50 tokens/s  20 s left" in printed.getvalue()
    bar.show({"eval_loss": 2.0})
    assert "step 30/40  loss -  validation 2.000" in printed.getvalue()  # no loss of an earlier step under this one
