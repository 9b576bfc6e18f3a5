"""Trackers and the hub, against stand-ins that note what they are told."""

import json
from importlib.util import find_spec

import pytest

from pi_attention.models import PiConfig, PiForCausalLM
from pi_attention.training import hub, trackers
from pi_attention.training.config import TrainConfig, to_plain
from pi_attention.training.trackers import Trackers, check_trackers

NOTING = """
import json
def note(what, /, *args, **kwargs):
    with open({file!r}, "a") as lines:
        lines.write(json.dumps([what, args, kwargs], default=str) + "\\n")
"""
STAND_INS = {
    "wandb": """
class Run:
    def log(self, values, **more): note("log", values, **more)
    def finish(self): note("finish")
class Config:
    def update(self, values, **more): note("settings", values)
config = Config()
def init(**more):
    note("init", **more)
    return Run()
""",
    "mlflow": """
def search_experiments(filter_string): return []
def create_experiment(name, **more): note("init", project=name)
def start_run(**more): note("run", **more)
def log_params(values): note("settings", dict(values))
def log_metrics(values, step): note("log", values, step=step)
def end_run(): note("finish")
class utils:
    class validation:
        MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH = 500, 100
""",
}
STAND_INS["trackio"] = STAND_INS["wandb"]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a module of a tracker's name on the path; returns what it was told."""

    def make(name):
        import sys

        monkeypatch.delitem(sys.modules, name, raising=False)
        noted = tmp_path / "noted.jsonl"
        (tmp_path / f"{name}.py").write_text(NOTING.format(file=str(noted)) + STAND_INS[name])
        monkeypatch.syspath_prepend(tmp_path)
        return lambda: [json.loads(line) for line in noted.read_text().splitlines()]

    return make


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_is_told_settings_and_figures(tmp_path, stand_in, name):
    noted = stand_in(name)
    (tmp_path / "book").mkdir()
    with Trackers([name], tmp_path / "book", to_plain(TrainConfig())) as opened:
        opened.log(10, {"loss": 2.5, "eval_loss": 2.75})
    told = {what: (args, kwargs) for what, args, kwargs in noted()}
    assert told["init"][1]["project"] == trackers.PROJECT
    assert "book" in (told["init"][1].get("name"), told.get("run", ((), {}))[1].get("run_name"))
    assert told["settings"][0][0]["model.window"] == 16
    assert told["log"] == ([{"train/loss": 2.5, "eval/loss": 2.75}], {"step": 10}) and "finish" in told


def test_tensorboard_writes_events_into_the_run(tmp_path):
    event_file_loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Trackers(["tensorboard"], tmp_path, to_plain(TrainConfig())) as opened:
        opened.log(1, {"loss": 2.5})
    read = event_file_loader.EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 2.5)]


def test_none_writes_nothing(tmp_path):
    with Trackers(["none"], tmp_path, to_plain(TrainConfig())) as opened:
        opened.log(1, {"loss": 2.5})
    assert not list(tmp_path.iterdir())


def test_wrong_trackers_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "trackio" else find_spec("json"))
    for names, words in (
        (["wandbb"], "no tracker"),
        (["trackio"], "pip install trackio"),
        (["none", "wandb"], "alone"),
    ):
        with pytest.raises(ValueError, match=words):
            check_trackers(names)


class Hub:
    """A hub that notes what it is told, in place of `HfApi`."""

    told: list = []  # noqa: RUF012 of all instances
    user: str | None = "someone"

    def whoami(self):
        if self.user is None:
            raise OSError("Token is required")

    def create_repo(self, repository, **options):
        from types import SimpleNamespace

        self.told.append(("create", repository, options))
        return SimpleNamespace(repo_id=repository)

    def upload_folder(self, **options):
        self.told.append(("upload", options["repo_id"], options))


@pytest.fixture
def a_hub(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "told", [])
    return Hub


def test_a_model_is_pushed_with_its_card_to_a_private_repository(tmp_path, a_hub):
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    PiForCausalLM(PiConfig(**sizes)).save_pretrained(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"")
    hub.check_hub("someone/book")
    hub.push(tmp_path, "someone/book")
    (made, _, options), (uploaded, repository, upload) = a_hub.told
    assert (made, uploaded, repository) == ("create", "upload", "someone/book")
    assert options == {"private": True, "exist_ok": True}
    from fnmatch import fnmatch

    sent = {path.name for path in tmp_path.iterdir() if any(fnmatch(path.name, p) for p in upload["allow_patterns"])}
    assert {"README.md", "config.json", "model.safetensors"} <= sent and "optimizer.pt" not in sent


def test_what_cannot_be_pushed_is_refused_before_any_work(tmp_path, a_hub, monkeypatch):
    with pytest.raises(ValueError, match="names no repository"):
        hub.check_hub("some one/../book")
    monkeypatch.setattr(a_hub, "user", None)
    with pytest.raises(ValueError, match="hf auth login"):
        hub.check_hub("someone/book")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        hub.push(tmp_path, "someone/book")
    assert not a_hub.told
