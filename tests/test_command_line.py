"""Whatever is typed, the command line answers with one line and a code: no traceback, and never 0 for a wrong call."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
from rich.console import Console

from pi_attention.cli.limits import FRACTIONS, LEAST, POSITIVE
from pi_attention.cli.main import COMMANDS, main, parse
from pi_attention.cli.options import option_names
from pi_attention.training.config import TrainConfig, load_yaml
from pi_attention.units import in_flops

ROOT = Path(__file__).parents[1]
TINY = """
--steps 2 --save-every 2 --hidden-size 16 --layers 1 --heads 2 --window 4 --period 4 --skips 2 --context 32
--eval-every 2 --eval-blocks 1 --log-every 1 --warmup-steps 1
""".split()  # noqa: SIM905
FIRST = {"eval": "RUN", "generate": "RUN", "serve": "RUN", "inspect": "RUN"}  # commands that take the folder of a run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run and with inputs of every wrong kind."""
    folder = tmp_path_factory.mktemp("place")
    text = "".join(f"{i} and {i * i}. " for i in range(200))
    (folder / "text.txt").write_text(text)
    parse(["train", "--data", str(folder / "text.txt"), "--out", str(folder / "run"), *TINY]).execute(
        Console(quiet=True)
    )
    (folder / "one.txt").write_text("a")
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes(b"caf\xe9 ")
    (folder / "empty.jsonl").touch()
    (folder / "empty.csv").touch()
    (folder / "no.parquet").write_bytes(b"x")
    (folder / "numbers.csv").write_text("text\n0\n1\n2\n")  # text, but too little of it
    (folder / "numbers.jsonl").write_text('{"text": 0}\n')
    (folder / "surrogate.jsonl").write_text('{"text": "\\ud800"}\n')
    (folder / "torn.jsonl").write_text('{"text": "a')
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "folder" / "sub.txt").mkdir(parents=True)
    (folder / "loops").mkdir()
    (folder / "loops" / "x.txt").symlink_to(folder / "loops")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    for name, content in CONFIGS.items():
        (folder / name).write_bytes(content)
    for kind, damage in RUNS.items():
        shutil.copytree(folder / "run" / "model", folder / kind)
        damage(folder / kind)
    return folder


CONFIGS = {
    "list.yaml": b"[1, 2]",
    "broken.yaml": b"data: [",
    "latin.yaml": b"# \xe9",
    "null.yaml": b"data: null\nmodel: null\nrun: null\nwindow: null",
    "unknown.yaml": b"wnidow: 3",
    "number.yaml": b"3: 4",
    "date.yaml": b"a: 2020-13-45",
    "tab.yaml": b"a:\n\t- b",
}
RUNS = {
    "no-json": lambda run: (run / "config.json").write_text("{"),
    "list-json": lambda run: (run / "config.json").write_text("[]"),
    "llama": lambda run: (run / "config.json").write_text('{"model_type": "llama"}'),
    "wrong-window": lambda run: change(run, window=0),
    "wrong-shape": lambda run: change(run, hidden_size=32),
    "cut-weights": lambda run: (run / "model.safetensors").write_bytes(b"\x08\x00"),
    "no-weights": lambda run: (run / "model.safetensors").unlink(),
}
CONFIGURATIONS = list(RUNS)[:4]  # `inspect` needs no weights
DATA = """
one.txt empty.txt latin.txt empty.jsonl empty.csv no.parquet numbers.csv numbers.jsonl surrogate.jsonl torn.jsonl
picture.png folder loops gone.txt nowhere.txt text.txt/x nobody/no-such-set
""".split()  # noqa: SIM905


def change(run, **settings):
    file = run / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def called(arguments, monkeypatch):
    """Exit code and what a call printed, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with monkeypatch.context() as patched, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patched.setattr(sys, "argv", ["pi-attention", *map(str, arguments)])
        try:
            main()
        except SystemExit as stopped:
            return stopped.code, out.getvalue(), err.getvalue()
    raise AssertionError("main ends by an exit code")


def fields(kind):
    """Name and annotation, without None, of every setting of a command."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from fields(hint)
            continue
        if get_origin(hint) is not None and get_origin(hint) not in (Literal, tuple):
            hint = next((m for m in get_args(hint) if m is not type(None)), hint)
        yield field.name, hint


def wrong_values(name, hint):
    if get_origin(hint) is tuple:
        return wrong_values(name, get_args(hint)[0])
    if get_origin(hint) in (Literal, Union):
        return ["neither", "-1", ""]
    if hint is int:
        return ["-1", "x", "1.5", "", "nan", str(10**30), *(["0"] if LEAST.get(name, 1) else [])]
    if hint is float:
        low = ["0"] if name in (*POSITIVE, *FRACTIONS) else []
        return ["-0.5", "x", "", "nan", "inf", "1e999", *low, *(["1", "1.5"] if name in FRACTIONS else [])]
    return []


def mistyped(word, draw):
    """The word with a letter changed, lost, doubled or swapped."""
    at = draw.randrange(2, len(word)) if word.startswith("--") else draw.randrange(len(word))
    return draw.choice(
        [word[:at] + "q" + word[at + 1 :], word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:], word + "q"]
    )


def wrong_call(draw, place):
    """Arguments of which at least one is wrong, for a drawn command."""
    command = draw.choice([name for name in COMMANDS if name != "env"])  # which takes nothing
    kind = COMMANDS[command]
    start = [command, *([place / "run"] if command in FIRST else [])]
    options = [name for name in option_names(kind) if name not in ("--run", "--action", "--name")]
    which = draw.randrange(7)
    if which == 0:
        name = mistyped(command, draw)
        return [name, "--help"] if name not in COMMANDS else [command + "q"]
    if which == 1:
        name = mistyped(draw.choice(options), draw)
        return [*start, name if name not in options else name + "q", draw.choice(["3", "x", "[/y]"])]
    if which in (2, 3):
        name, hint = draw.choice([(n, h) for n, h in fields(kind) if wrong_values(n, h)])
        if f"--{name.replace('_', '-')}" in options:
            return [*start, f"--{name.replace('_', '-')}", draw.choice(wrong_values(name, hint))]
        return [*start, "--", "too", "many", "words"]
    if which == 4:
        return [*start, "--config", place / draw.choice([*CONFIGS, "nowhere.yaml", "folder", "x[/y].yaml"])]
    if which == 5 and command in ("train", "eval"):
        name = draw.choice(DATA)
        data = place / name if (place / name).exists() or "." in name else name
        return [*start, "--data", data, "--context", "64", *(["--out", place / "new"] if command == "train" else [])]
    if which == 5 and command in FIRST:
        runs = [place / kind for kind in (CONFIGURATIONS if command == "inspect" else RUNS)]
        return [command, draw.choice([*runs, place / "text.txt", "x[/y]", "[bold]", "é\udcff"])]
    out = draw.choice(["text.txt", "text.txt/x", "text.txt/a/b"])
    if command == "plan":
        return [*start, "--out", place / "text.txt" / "plan.yaml"]
    if command == "train":
        return [*start, "--data", place / "text.txt", "--out", place / out]
    if command in ("eval", "inspect"):
        return [*start, "--out", place / out]
    if command == "convert":
        return [*start, "--model", place / "nowhere", "--out", place / out]
    return [*start, draw.choice(["no-such-action", "run", "a"]), "no-such-name", "more"]


def check_wrong_calls(place, monkeypatch, seed, count):
    draw = random.Random(seed)
    for _ in range(count):
        arguments = wrong_call(draw, place)
        code, out, err = called(arguments, monkeypatch)
        assert code == 2, (arguments, code, out, err)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, (arguments, err)
        assert "Traceback" not in out + err, (arguments, err)


@pytest.mark.parametrize("seed", range(4))
def test_no_wrong_call_ends_in_a_traceback_or_in_success(seed, place, monkeypatch, offline):
    check_wrong_calls(place, monkeypatch, seed, 85)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
def test_no_wrong_call_of_very_many_ends_in_a_traceback_or_in_success(seed, place, monkeypatch, offline):
    check_wrong_calls(place, monkeypatch, seed, 300)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "'trian' is no command: did you mean train?"),
        (
            ["train", "--lerning-rate", "1"],
            "'--lerning-rate' is no option of pi-attention train: did you mean --learning-",
        ),
        (["train", "--learning_rat=1"], "did you mean --learning-rate?"),
        (["train", "--steps", "x"], "--steps: invalid literal for int() with base 10: 'x'. pi-attention train --help"),
        (["bill", "--model", "9b"], "invalid choice '9b' for argument '--model'. Expected one of ('1b', '8b', '70b')"),
        (["eval", "--limit"], "Missing value for argument '--limit'"),
        (["train", "--period"], "period is empty"),
        ([], "a command is missing: use one of train, eval"),
        (["train", "--config", "a", "--config=b"], "--config is given twice"),
        (["train", "--learning-rate", "nan"], "learning_rate must be a finite number, got nan"),
        (["eval", "--limit", "0"], "limit must be at least 1, got 0"),
        (["eval", "--limit", "-1"], "limit must be at least 1, got -1"),
        (["eval", "--context", "1"], "context must be at least 2, got 1"),
        (["generate", "--seed", str(2**32)], "seed must be at most 4,294,967,295"),
        (["eval", "x[/y]"], "run='x[/y]' holds no model."),
        (["train", "--data", "[red]x.txt"], "data='[red]x.txt' does not exist"),
        (["train", "--data", ""], "data is empty"),
        (["train", "--fusion", "mass"], "fusion='mass' is of a gate, and gate=False: add --gate"),
        (["train", "--gate", "--skips", "0"], "gate=True is of skips, and no layer has any"),
        (
            ["train", "--layers", "1", "--layer-patterns", "local", "dense"],
            "layer_patterns has 2 entries, and layers=1",
        ),
        (["train", "--skips", "9", "--layer-patterns", "local", "dense"], "skips=9 is of skips, and no layer has any"),
        (["train", "--skips", "0", "--period", "9"], "period=(9,) is of skips, and no layer has any"),
        (["train", "--window", "9", "--layer-patterns", "dense"], "window=9 is of a window, and all layers are dense"),
        (["train", "--kv-heads", "3"], "kv_heads=3 must divide heads=4"),
        (["plan", "--least-window", "40"], "least_window=40 is of coordinated plans: add --coordinated"),
        (["plan", "--context", "5", "--sinks", "10"], "sinks=10 must be fewer than the tokens of context=5"),
        (
            ["plan", "--goal", "few-products", "--heads", "1"],
            "heads=1 shares no distance, as goal='few-products' needs",
        ),
        (["plan", "--goal", "least", "--context", "1", "--out", "x.yaml"], "context=1 has no token to predict"),
        (["plan", "--heads", "100000000"], "heads must be at most 1,024"),
        (["convert", "--model", "m", "--part", "gates"], "part='gates', but gate=False leaves none: add --gate"),
        (["convert", "--model", "m", "--learning-rate", "1"], "learning_rate=1.0 is of a fine-tune"),
        (["convert", "--model", "m", "--seed", "1"], "seed=1 is of a fine-tune"),
        (["convert", "--model", "m", "--part", "lora"], "part='lora' is of a fine-tune"),
        (["convert", "--model", "m", "--period", "9"], "period=(9,) is of skips, and skips=0 is none: add --skips"),
        (["convert", "--model", "m", "--gate"], "gate=True is of skips, and skips=0 is none: add --skips"),
        (["convert", "--model", "m", "--dense-layers", "1", "--layers", "0"], "leave one of them out"),
        (
            ["convert", "--model", "m", "--dense-layers", "1", "--eval-blocks", "0"],
            "are chosen on eval_blocks=0",
        ),
        (["convert", "--model", "m", "--dense-layers", "1", "--context", "900"], "with sinks=4 covers context=900"),
        (["convert", "--model", "m", "--layers", "-1"], "layers must be at least 0, got -1"),
        (["train", "--layers", "2", "--layer-patterns", "pi", "all-skips", "--skips", "0"], '"all-skips", and skips=0'),
        (["inspect", "--tokens", "64"], "tokens=64 is of a measurement: add --empirical, or leave it out"),
        (["inspect", "run", "--window", "99"], "window=99 is given beside run='run', which has its own"),
        (["eval", "saved"], "run='saved' holds no model"),
    ],
)
def test_what_is_wrong_is_named(arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = called(arguments, monkeypatch)
    assert code == 2 and words in err
    assert err.count("\n") == 1


def test_paths_are_named_with_their_argument(place, monkeypatch):
    run = place / "run"
    for arguments, words in (
        (["train", "--data", place / "text.txt", "--out", place / "text.txt" / "x"], "out='"),
        (["train", "--data", place / "one.txt", "--context", "2"], "no text, so no block of context=2"),
        (["eval", run, "--out", place / "text.txt"], "is a file: choose another one"),
        (["generate", run, "--prompt", "caf\udcff"], r"prompt='caf\udcff' is not UTF-8"),
        (["generate", run, "--prompt", ""], "prompt is empty"),
        (["generate", place / "llama"], "a model of the kind 'llama'"),
        (["eval", place / "cut-weights"], "cannot be loaded"),
    ):
        code, _, err = called(arguments, monkeypatch)
        assert code == 2 and words in err, err


def test_a_model_that_lacks_weights_is_not_filled_up_at_random(place, monkeypatch, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(place / "run" / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.norm.weight")
    save_file(weights, file, {"format": "pt"})
    code, _, err = called(["eval", tmp_path], monkeypatch)
    assert code == 2 and "lacks weights of its model, such as model.norm.weight" in err


def test_a_refused_evaluation_leaves_the_earlier_one(place, monkeypatch):
    (place / "run" / "eval.json").write_text("before")
    assert called(["eval", place / "run", "--limit", "-1"], monkeypatch)[0] == 2
    assert (place / "run" / "eval.json").read_text() == "before"


def test_values_of_a_file_are_of_their_kind(tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    for text, words in (
        ("optimizer: {steps: abc}", "optimizer.steps must be a whole number, got 'abc'"),
        ("optimizer: {steps: true}", "optimizer.steps must be a whole number, got True"),
        ("model: {fusion: sum}", "model.fusion must be one of ['gate', 'mass'], got 'sum'"),
        ("model: {period: [3, x]}", "model.period[1] must be a whole number, got 'x'"),
        ("data: {data: 7}", "data.data must be text, got 7"),
        ("data: 7", "data must be a mapping of settings, got 7"),
    ):
        file.write_text(text)
        code, _, err = called(["train", "--config", file], monkeypatch)
        assert code == 2 and words in err, err
    file.write_text("optimizer: {learning_rate: 3e-3, weight_decay: 0}")  # text to YAML, which wants 3.0e-3
    assert parse(["train", "--config", str(file)]).optimizer.learning_rate == 3e-3


def test_an_error_of_the_library_shows_where_on_demand(monkeypatch):
    monkeypatch.setattr(COMMANDS["plan"], "execute", lambda self, console: {}["key"])
    code, _, err = called(["plan"], monkeypatch)
    assert code == 1 and "error: 'key' (KeyError; with PI_ATTENTION_TRACEBACK=1 it says where)" in err
    monkeypatch.setenv("PI_ATTENTION_TRACEBACK", "1")
    with pytest.raises(KeyError):
        called(["plan"], monkeypatch)


def shell(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pi_attention.cli", *map(str, arguments)],
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
    )


NARROW = {"COLUMNS": "20", "NO_COLOR": "1", "TERM": "dumb"}
PLAIN_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "latin-1"}, PLAIN_LOCALE, PLAIN_LOCALE | NARROW, {"FORCE_COLOR": "1", "COLUMNS": "20"}],
    ids=["latin-1", "C locale", "C locale, 20 columns", "20 columns, colours"],
)
def test_training_runs_in_any_terminal(environment, tmp_path):
    text = tmp_path / "umlauts [x] :smile:.txt"
    text.write_text("".join(f"{i} × ü is π[/b] {i * i}. " for i in range(200)), encoding="utf-8")
    out = tmp_path / "run [/x]"
    done = shell("train", "--data", text, "--out", out, *TINY, **environment)
    assert done.returncode == 0, done.stderr
    assert {"summary.json", "sample.txt", "train.yaml", "model"} <= {path.name for path in out.iterdir()}
    (out / "sample.txt").read_text(encoding="utf-8")
    assert os.fsencode(load_yaml(TrainConfig, out / "train.yaml").data.data).endswith(b":smile:.txt")
    done = shell("generate", out, "--prompt", "ü×π", "--max-new-tokens", "3", **environment)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_the_locale_cannot_express_is_refused(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("text " * 100)
    done = shell("train", "--data", text, "--out", tmp_path / "π", *TINY, **PLAIN_LOCALE)
    assert done.returncode == 2 and b"set PYTHONUTF8=1" in done.stderr


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_help_fits_the_terminal(arguments, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = called([*arguments, "--help"], monkeypatch)
    assert code == 0 and out and max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("arguments", [["plan", "--context", "4096"], ["inspect", "--context", "512"], ["--help"]])
def test_tables_print_in_any_terminal(arguments, tmp_path):
    more = ["--out", tmp_path] if arguments[0] == "inspect" else []
    for environment in (PLAIN_LOCALE | NARROW, {"PYTHONIOENCODING": "latin-1"}):
        done = shell(*arguments, *more, **environment)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_a_reader_that_leaves_early_sees_no_traceback(tmp_path):
    command = [sys.executable, "-m", "pi_attention.cli", "plan", "--context", "4096"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.wait()


def test_a_key_that_stands_twice_in_a_file_is_named(tmp_path):
    (tmp_path / "twice.yaml").write_text("model:\n  heads: 2\nmodel:\n  heads: 4\n")
    with pytest.raises(ValueError, match=r"twice\.yaml.*the key 'model' stands twice"):
        load_yaml(TrainConfig, tmp_path / "twice.yaml")
    with pytest.raises(FileNotFoundError, match="is no file, but a folder"):
        load_yaml(TrainConfig, tmp_path)


def test_output_that_was_closed_before_the_start_is_no_error(tmp_path):
    command = f'"{sys.executable}" -m pi_attention.cli plan --context 512 --layers 4 >&-'
    assert subprocess.run(command, shell=True, cwd=tmp_path).returncode == 0


def test_a_setting_and_its_limit_have_one_name():
    names = {name for kind in COMMANDS.values() for name, _ in fields(kind)}
    assert {*LEAST, *POSITIVE, *FRACTIONS} <= names


def test_a_plan_says_what_it_wrote_and_counts_in_units_that_suit(tmp_path, monkeypatch):
    asked = ["plan", "--context", "64", "--layers", "2", "--heads", "2", "--head-dim", "16", "--budget", "16"]
    code, out, err = called([*asked, "--out", tmp_path / "plan.yaml"], monkeypatch)
    assert (code, err) == (0, "") and "kFLOP a layer forward" in out
    assert f"written: {tmp_path / 'plan.yaml'}, for a model of 2 layers and 32 features (2 heads of 16)" in out
    assert [in_flops(operations) for operations in (999, 1e3, 2.5e9)] == ["999 FLOP", "1.00 kFLOP", "2.50 GFLOP"]


def test_the_help_of_the_command_names_its_version(monkeypatch):
    code, out, _ = called(["--help"], monkeypatch)
    assert code == 0 and "pi-attention --version" in out


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "out='p.yaml' cannot be used, no space left"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full (I/O error"),
    ],
)
def test_a_full_disk_names_the_remedy(error, words, monkeypatch, capsys, tmp_path):
    def full(*_, **__):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(sys, "argv", ["pi-attention", "plan", "--context", "64", "--out", "p.yaml"])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and words in printed and "free room on the disk, then do it again" in printed
    assert not list(tmp_path.iterdir())
