"""Folders and files of a stranger: reading them runs none of their code and leads nowhere else."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pi_attention import files
from pi_attention.cli.main import parse
from pi_attention.cli.runs import load_run
from pi_attention.cli.terminal import make_console
from pi_attention.data.corpus import load_documents
from pi_attention.data.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[1]
RUN = ROOT / "tests" / "fixtures" / "run"
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


class Poison:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.fixture
def marker(tmp_path):
    """A file that nothing must create."""
    yield tmp_path / "poisoned"
    assert not (tmp_path / "poisoned").exists(), "code of a stranger has run"


@pytest.fixture
def model(tmp_path):
    """A copy of a model's folder, to be poisoned."""
    return Path(shutil.copytree(RUN / "model", tmp_path / "model"))


def test_the_poison_is_one(tmp_path):
    pickle.loads(pickle.dumps(Poison(tmp_path / "poisoned")))
    assert (tmp_path / "poisoned").exists()


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: word.value for word in node.keywords}


@pytest.mark.parametrize("part", ["pi_attention", "experiments", "benchmarks", "examples"])
def test_no_program_of_ours_unpickles_or_runs_what_it_reads(part):
    for path in (ROOT / part).rglob("*.py"):
        if path.match("training/state.py"):
            continue  # its unpickler has an allow-list, which tests/test_trust.py tries
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & FORBIDDEN, path
        for name, words in calls(tree):
            values = {word: ast.unparse(value) for word, value in words.items()}
            assert name not in ("eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load"), f"{path}: {name}"
            assert values.get("trust_remote_code") in (None, "False"), f"{path}: {name}"
            assert values.get("allow_pickle") in (None, "False"), f"{path}: {name}"
            assert values.get("shell") in (None, "False"), f"{path}: {name}"
            if name == "torch.load":
                assert values.get("weights_only") == "True", f"{path}: torch.load reads pickles"


def test_pickled_weights_are_not_read_even_where_there_are_no_others(model, marker):
    (model / "model.safetensors").unlink()
    torch.save({"weight": Poison(marker)}, model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be loaded.*safetensors"):
        load_run(model)


def test_pickled_weights_beside_safe_ones_are_left_alone(model, marker):
    torch.save({"weight": Poison(marker)}, model / "pytorch_model.bin")
    assert load_run(model)[0].config.model_type == "pi"


def test_pickled_weights_are_not_converted(tmp_path, marker):
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    load_tokenizer("bytes").save_pretrained(tmp_path)
    torch.save({"weight": Poison(marker)}, tmp_path / "pytorch_model.bin")
    command = parse(["convert", "--model", str(tmp_path), "--out", str(tmp_path / "out"), "--context", "64"])
    with pytest.raises((OSError, ValueError), match="safetensors"):
        command.execute(make_console())


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_in_a_folder_does_not_run(model, marker, where):
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Thing: pass\n"
    (model / "theirs.py").write_text(code)
    settings = json.loads((model / where).read_text())
    theirs = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "theirs.Thing")
    settings["auto_map"] = theirs if where == "config.json" else {"AutoTokenizer": ["theirs.Thing", "theirs.Thing"]}
    if where == "tokenizer_config.json":
        settings["tokenizer_class"] = "Thing"
    (model / where).write_text(json.dumps(settings))
    try:
        load_run(model)
    except ValueError as error:
        assert "cannot be loaded" in str(error)


def test_an_index_of_weights_names_none_outside_of_its_folder(model):
    (model / "model.safetensors").rename(model.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names '\.\./elsewhere"):
        load_run(model)


def test_a_link_in_place_of_a_half_written_file_is_not_followed(tmp_path):
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    run.mkdir()
    (run / ".partial-summary.json").symlink_to(precious)
    files.write_text(run / "summary.json", "{}")
    assert precious.read_text() == "mine" and (run / "summary.json").read_text() == "{}"
    assert not (run / "summary.json").is_symlink()


@pytest.mark.parametrize("ending", [".pkl", ".pt", ".bin"])
def test_pickles_are_no_corpus(tmp_path, marker, ending):
    file = tmp_path / f"text{ending}"
    file.write_bytes(pickle.dumps(Poison(marker)))
    with pytest.raises(ValueError, match="unknown ending"):
        load_documents(str(file))


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet", ".txt"])
def test_pickles_under_the_name_of_a_corpus_are_no_text(tmp_path, marker, ending):
    file = tmp_path / f"text{ending}"
    file.write_bytes(pickle.dumps(Poison(marker)))
    with pytest.raises(ValueError, match="data="):
        load_documents(str(file))


def test_arrays_of_experiments_hold_no_objects(tmp_path, marker):
    from experiments.data import prepared

    (tmp_path / "prepared").mkdir()
    np.savez(tmp_path / "prepared" / "x.npz", images=np.array([Poison(marker)], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        prepared(tmp_path, "x", dict)


def test_settings_in_yaml_make_no_objects(tmp_path, marker):
    file = tmp_path / "train.yaml"
    file.write_text(f"run: !!python/object/apply:pathlib.Path.touch [{str(marker)!r}]\n")
    with pytest.raises(ValueError, match="is no YAML"):
        parse(["train", "--config", str(file)])
