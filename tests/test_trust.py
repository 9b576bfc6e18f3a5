"""Runs of earlier versions go on, and no file of a run's folder is executed by loading it."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from pi_attention.cli.main import parse
from pi_attention.training import checkpoints

FIXTURES = Path(__file__).parent / "fixtures"
LOSSES = {3: 5.511031, 4: 5.483682, 5: 5.451049, 6: 5.443225}
"""Of the uninterrupted runs of 6 steps, by the version that wrote the checkpoints of step 2."""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Of one process, by transformers.Trainer (checkpoint-2), and of cp=2 (sharded-2)."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open(FIXTURES / "earlier-runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return {"checkpoint-2": tmp_path / "trainer", "sharded-2": tmp_path / "sharded"}


def resume(run):
    assert parse(["train", "--out", str(run), "--resume"]).execute(Console(quiet=True)) == 0


@pytest.mark.parametrize("name", ["checkpoint-2", "sharded-2"])
def test_a_run_of_an_earlier_version_goes_on(name, runs):
    run = runs[name]
    resume(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert {step: losses[step] for step in LOSSES} == pytest.approx(LOSSES, abs=2e-6)
    assert [path.name for path in checkpoints.checkpoints_of(run)] == [name, "checkpoint-4", "checkpoint-6"]
    assert not (run / checkpoints.PARTIAL).exists()


class Poison:
    """Makes a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def as_pickle(thing):
    return pickle.dumps(thing, protocol=2)


def as_torch_saves(thing):
    buffer = io.BytesIO()
    torch.save({"state": thing, "param_groups": []}, buffer)
    return buffer.getvalue()


def poison(file, mark, write):
    """Put a pickle that makes the file `mark` in a file's place, in a checkpoint whose list of files is right."""
    raw = write(Poison(mark))
    pickle.loads(raw) if write is as_pickle else torch.load(io.BytesIO(raw), weights_only=False)
    assert mark.exists()  # so it would
    mark.unlink()
    file.write_bytes(raw)
    (file.parent / checkpoints.MANIFEST).unlink()
    checkpoints.seal(file.parent, checkpoints.contents(file.parent))


@pytest.mark.parametrize(
    ("name", "file", "write"),
    [
        ("sharded-2", ".metadata", as_pickle),
        ("sharded-2", "__0_0.distcp", as_torch_saves),
        ("checkpoint-2", "optimizer.pt", as_pickle),
        ("checkpoint-2", "optimizer.pt", as_torch_saves),
    ],
)
def test_a_poisoned_file_is_refused_by_name(name, file, write, runs, tmp_path):
    poison(runs[name] / name / file, tmp_path / "mark", write)
    with pytest.raises(ValueError, match=rf"{name} of out=.* cannot be loaded"):
        resume(runs[name])
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("file", ["rng_state.pth", "scheduler.pt", "training_args.bin"])
def test_a_poisoned_file_that_nothing_needs_is_not_read(file, runs, tmp_path):
    poison(runs["checkpoint-2"] / "checkpoint-2" / file, tmp_path / "mark", as_torch_saves)
    resume(runs["checkpoint-2"])
    assert not (tmp_path / "mark").exists()


def test_a_tensor_that_a_list_calls_something_else_is_not_unpickled(runs, tmp_path):
    """torch.distributed.checkpoint unpickles what its list says is no tensor."""
    folder = runs["sharded-2"] / "sharded-2"
    listed = pickle.loads((folder / ".metadata").read_bytes())
    name = "model.model.norm.weight"
    place = next(place for index, place in listed.storage_data.items() if index.fqn == name)
    listed.state_dict_metadata[name] = BytesStorageMetadata()
    listed.storage_data[MetadataIndex(name)] = place
    mark = tmp_path / "mark"
    torch.save(Poison(mark), folder / "poison")
    place.relative_path, place.offset, place.length = "poison", 0, (folder / "poison").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(listed))
    (folder / checkpoints.MANIFEST).unlink()
    with pytest.raises(ValueError, match=rf"sharded-2 of out=.* cannot be loaded: .*{name} is no tensor"):
        resume(runs["sharded-2"])
    assert not mark.exists()
