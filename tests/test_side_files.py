"""What lies beside a run's checkpoints is whole or absent, and damage is named, never trained over."""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import matplotlib.figure
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from pi_attention import files, plots
from pi_attention.cli.main import parse
from pi_attention.json_lines import append_json_line, read_json_lines
from pi_attention.training import checkpoints
from pi_attention.training.config import TrainConfig, load_yaml, save_yaml
from pi_attention.training.metrics import append_metrics, drop_metrics_after, read_metrics

TINY = """
--steps 6 --save-every 2 --hidden-size 16 --layers 1 --heads 2 --window 4 --period 4 --skips 2 --context 32
--eval-every 6 --eval-blocks 1 --log-every 1 --warmup-steps 1
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "t.txt").write_text("".join(f"{i} and {i * i}. " for i in range(200)))
    execute("train", "--data", str(folder / "t.txt"), "--out", str(folder / "r"), *TINY)
    return folder / "r"


@pytest.fixture
def stopped(run, tmp_path):
    """A copy of the run as if it had been killed before its report."""
    shutil.copytree(run, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "model")
    (tmp_path / "r" / "summary.json").unlink()
    return tmp_path / "r"


def execute(*arguments):
    return parse(list(arguments)).execute(Console(quiet=True))


class Killed(BaseException):
    pass


def dies(*args, **kwargs):
    raise Killed


def test_a_text_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "new" / "f.txt"
    files.write_text(file, "é\n")
    assert file.read_bytes() == "é\n".encode()
    monkeypatch.setattr(files, "sync", dies)  # after the bytes, before the name
    with pytest.raises(Killed):
        files.write_text(file, "other")
    assert file.read_bytes() == "é\n".encode()


def test_a_picture_is_whole_or_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "p.png"
    file.write_bytes(b"before")
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", dies)
    with pytest.raises(Killed):
        plots.save(plots.curves({"a": [(0, 0), (1, 1)]}, "x", "y"), file)
    assert file.read_bytes() == b"before"


def test_settings_keep_letters_of_any_language(tmp_path):
    config = TrainConfig()
    config.data.data = "Überschriften/π.txt"
    save_yaml(config, tmp_path / "c.yaml")
    assert "Überschriften/π.txt" in (tmp_path / "c.yaml").read_text("utf-8")
    assert load_yaml(TrainConfig, tmp_path / "c.yaml") == config


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95, 0.999])
def test_settings_that_were_cut_off_are_named_and_stay(share, stopped):
    text = (stopped / "train.yaml").read_text()
    (stopped / "train.yaml").write_text(text[: int(share * len(text))])
    before = (stopped / "train.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"train\.yaml is incomplete"):
        execute("train", "--out", str(stopped), "--resume")
    assert (stopped / "train.yaml").read_bytes() == before


def test_settings_that_cannot_be_read_are_named_and_stay(stopped):
    text = (stopped / "train.yaml").read_text().replace("data: ", "data: [", 1)
    (stopped / "train.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"train\.yaml.*no YAML"):
        execute("train", "--out", str(stopped), "--resume")
    assert (stopped / "train.yaml").read_text() == text


def test_a_torn_last_line_of_metrics_is_dropped_with_a_warning(tmp_path):
    for step in (1, 2):
        append_metrics(tmp_path, step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 3, "lo')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: the last line is incomplete"):
        drop_metrics_after(tmp_path, 2)
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 3, "lo')
    append_metrics(tmp_path, 3, {"loss": 0.5})  # and never glued to what was cut off
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def _append_many(path, writer):
    for number in range(200):
        append_json_line(path, [writer, number, "x" * 5000, "\udcff"])


def test_lines_of_several_writers_are_all_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"torn')
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(partial(_append_many, path), range(4)))
    rows = [entry for _, entry in read_json_lines(path)]
    assert sorted(row[:2] for row in rows) == [[writer, number] for writer in range(4) for number in range(200)]


def test_another_line_of_metrics_that_is_damaged_is_named(tmp_path):
    for line in (b"{\n", b"7\n", b'{"loss": 1}\n'):
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'{"step": 3}\n')
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            read_metrics(tmp_path)


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


DAMAGES = {
    "cut": lambda folder: (folder / "__0_0.distcp").write_bytes(b"\x08"),
    "empty": lambda folder: (folder / ".metadata").write_bytes(b""),
    "flipped": lambda folder: flip(folder / "__0_0.distcp"),
    "missing": lambda folder: (folder / ".metadata").unlink(),
    "list": lambda folder: (folder / checkpoints.MANIFEST).write_bytes(b"{"),
    "empty list": lambda folder: (folder / checkpoints.MANIFEST).write_bytes(b"{}"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used_on_demand(kind, run, stopped):
    DAMAGES[kind](stopped / "checkpoint-6")
    with pytest.raises(ValueError, match=r"checkpoint-6 of out=.* is damaged.*checkpoint-4: .*--checkpoint 4"):
        execute("train", "--out", str(stopped), "--resume")
    assert (stopped / "checkpoint-6").exists() and not (stopped / "model").exists()
    assert execute("train", "--out", str(stopped), "--resume", "--checkpoint", "4") == 0
    assert checkpoints.damage(stopped / "checkpoint-6") is None and (stopped / "aside-checkpoint-6").exists()
    whole, again = (load_file(folder / "model" / "model.safetensors") for folder in (run, stopped))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert load_yaml(TrainConfig, stopped / "train.yaml").run.checkpoint is None


def test_without_a_whole_checkpoint_there_is_none_to_offer(stopped):
    for step in (4, 6):
        DAMAGES["empty"](stopped / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="no whole one before it"):
        execute("train", "--out", str(stopped), "--resume")


def test_a_checkpoint_is_chosen_only_of_a_run_that_has_it(stopped):
    with pytest.raises(ValueError, match=r"checkpoint=5, but .*\[4, 6\]"):
        execute("train", "--out", str(stopped), "--resume", "--checkpoint", "5")
    with pytest.raises(ValueError, match="add --resume"):
        execute("train", "--out", str(stopped), "--checkpoint", "4")


def test_the_bytes_of_a_checkpoint_are_read_once_by_some_rank(tmp_path):
    for name in ("__0_0.distcp", "__1_0.distcp"):
        (tmp_path / name).write_bytes(name.encode())
    checkpoints.seal(tmp_path, checkpoints.contents(tmp_path))
    assert [checkpoints.damage(tmp_path, rank, 2) for rank in range(2)] == [None, None]
    flip(tmp_path / "__1_0.distcp")
    found = [checkpoints.damage(tmp_path, rank, 2) for rank in range(2)]
    assert found == [None, "the bytes of __1_0.distcp have changed"]
    (tmp_path / "__1_0.distcp").write_bytes(b"")
    for rank in range(2):
        assert checkpoints.damage(tmp_path, rank, 2) == "__1_0.distcp has 0 bytes instead of 12"


def test_checkpoints_of_both_names_are_one_series(tmp_path):
    for name in ("sharded-2", "checkpoint-4", "sharded-10", "aside-checkpoint-12", "checkpoint-new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tensors").write_bytes(b"1")
    assert [path.name for path in checkpoints.checkpoints_of(tmp_path)] == ["sharded-2", "checkpoint-4", "sharded-10"]
    (tmp_path / ".partial").mkdir()
    checkpoints.publish_checkpoint(tmp_path / ".partial", tmp_path, 10, keep=2)
    assert [path.name for path in checkpoints.checkpoints_of(tmp_path)] == ["checkpoint-4", "checkpoint-10"]


def of_trainer(folder, bad=None):
    """A checkpoint as transformers.Trainer wrote it for an earlier version."""
    folder.mkdir()
    torch.save({"state": {0: torch.ones(50)}, "param_groups": []}, folder / "optimizer.pt")
    save_file({"w": torch.ones(50)}, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text("{}")
    if bad is not None:
        bad(folder)
    return folder


UNREADABLE = {
    "cut": (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08"), "model.safetensors cannot be read"),
    "empty": (lambda folder: (folder / "optimizer.pt").write_bytes(b""), "optimizer.pt cannot be read"),
    "flipped": (lambda folder: flip(folder / "optimizer.pt"), "optimizer.pt cannot be read"),
    "missing": (lambda folder: (folder / "model.safetensors").unlink(), "model*.safetensors is missing"),
    "half": (lambda folder: (folder / "optimizer.pt").unlink(), ".metadata is missing"),
    "no json": (lambda folder: (folder / "trainer_state.json").write_text("{"), "trainer_state.json cannot be read"),
    "nothing": (lambda folder: [path.unlink() for path in folder.iterdir()], "it is empty"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_can_be_verified_of_an_older_checkpoint_is(kind, tmp_path):
    bad, words = UNREADABLE[kind]
    of_trainer(tmp_path / "checkpoint-4")
    assert checkpoints.damage(of_trainer(tmp_path / "checkpoint-6", bad)) == words
    with pytest.raises(ValueError, match=f"checkpoint-6 of out=.* is damaged, {re.escape(words)}.*--checkpoint 4"):
        checkpoints.checkpoint_to_resume(tmp_path, None)
    with pytest.warns(UserWarning, match=r"checkpoint-4 of out=.* has no files\.json"):
        assert checkpoints.checkpoint_to_resume(tmp_path, 4) == tmp_path / "checkpoint-4"


def test_a_checkpoint_without_checksums_is_told_once_and_used(run, stopped):
    shutil.rmtree(stopped / "checkpoint-6")
    (stopped / "checkpoint-4" / checkpoints.MANIFEST).unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-4 of out=.* has no files\.json") as told:
        assert execute("train", "--out", str(stopped), "--resume") == 0
    assert sum("files.json" in str(warning.message) for warning in told) == 1
    whole, again = (load_file(folder / "model" / "model.safetensors") for folder in (run, stopped))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("hidden_size: 16", r"hidden_size=32 \(16 in checkpoint-6\)"),
        ("layers: 1", r"layers=2 \(1 in checkpoint-6\)"),
        ("window: 4", r"window=8 \(4 in checkpoint-6\)"),
        ("context: 32", r"context=64 \(32 in checkpoint-6\)"),
        ("qk_norm: true", r"qk_norm=False \(True in checkpoint-6\)"),
    ],
)
def test_settings_that_were_edited_are_named_with_those_of_the_checkpoint(setting, words, stopped):
    file, (name, value) = stopped / "train.yaml", setting.split(": ")
    text = file.read_text()
    assert f"{setting}\n" in text
    edited = text.replace(f"{setting}\n", f"{name}: {'false' if value == 'true' else 2 * int(value)}\n")
    file.write_text(edited)
    with pytest.raises(ValueError, match=rf"train\.yaml has other settings than the run's checkpoint: {words}\. Write"):
        execute("train", "--out", str(stopped), "--resume")
    assert file.read_text() == edited


def test_a_checkpoint_that_does_not_say_its_model_resumes(stopped):
    (stopped / "checkpoint-6" / checkpoints.CONFIG).unlink()
    (stopped / "checkpoint-6" / checkpoints.MANIFEST).unlink()
    with pytest.warns(UserWarning, match=r"has no files\.json"):
        assert execute("train", "--out", str(stopped), "--resume") == 0
