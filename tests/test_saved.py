"""What an earlier version saved, before patterns had a phase, still loads: a run, a model, a converted model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pi_attention import PiPattern
from pi_attention.cli.main import parse
from pi_attention.cli.runs import load_run
from pi_attention.convert import PiConvertedForCausalLM
from pi_attention.models import PiForCausalLM
from pi_attention.stack import DENSE
from pi_attention.training.config import TrainConfig, load_yaml, save_yaml
from pi_attention.training.resume import settings_to_resume
from pi_attention.training.train import model_config

FIXTURES = Path(__file__).parent / "fixtures"
RUN = PiPattern(8, (5, 7), 3, sinks=2)


@pytest.mark.parametrize(
    ("folder", "kind", "patterns"),
    [
        ("run/model", PiForCausalLM, [RUN, DENSE]),
        ("converted", PiConvertedForCausalLM, [DENSE, PiPattern(4, (3, 5, 7, 9), 3, sinks=2)]),
    ],
)
def test_a_saved_model_computes_what_it_did(folder, kind, patterns, tmp_path):
    ids = torch.tensor([[(7 * n * n + 3 * n) % 32 for n in range(40)]])
    want = torch.tensor(json.loads((FIXTURES / folder / "logits.json").read_text()), dtype=torch.float64)
    for again in (FIXTURES / folder, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float64)
        assert type(model) is kind and model.config.patterns() == patterns
        got = model(ids, use_cache=False).logits[0, -1, : len(want)]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        model.save_pretrained(tmp_path)  # as this version saves it


def test_a_saved_run_resumes_with_its_settings(tmp_path):
    shutil.copytree(FIXTURES / "run", tmp_path, dirs_exist_ok=True)
    asked = TrainConfig()
    asked.run.out = tmp_path
    config = settings_to_resume(asked)
    assert config.model.pattern() == RUN and config.model.phase is None  # of all heads: 0
    model, tokenizer = load_run(tmp_path)
    assert model_config(config, tokenizer).patterns() == model.config.patterns()
    asked.model.phase = (0,)  # the same in other words
    assert settings_to_resume(asked).model == config.model
    asked.model.phase = (0, 3)
    with pytest.raises(ValueError, match=r"phase=\[0, 3\] differs from None"):
        settings_to_resume(asked)


def test_a_flag_that_names_a_default_is_no_flag_left_out(tmp_path):
    shutil.copytree(FIXTURES / "run", tmp_path, dirs_exist_ok=True)
    resume = ["train", "--resume", "--out", str(tmp_path)]
    kept, default = load_yaml(TrainConfig, tmp_path / "train.yaml"), TrainConfig()
    assert kept.model.window != default.model.window and kept.model.gate != default.model.gate
    for flags in (["--window", str(default.model.window)], ["--no-gate"], ["--period", "5"]):
        with pytest.raises(ValueError, match="differs from"):
            parse([*resume, *flags])
    same = ["--window", str(kept.model.window), "--gate", "--phase", "0", "--parallel", "dp=1", "--batch-size", "1"]
    assert parse([*resume, *same]).run.resume
    with pytest.raises(ValueError, match=r"phase=.* needs a period|differs from"):
        parse([*resume, "--period", "None"])
    file = tmp_path / "asked.yaml"
    file.write_text("model: {gate: false}")
    with pytest.raises(ValueError, match="gate=False differs from True"):
        parse([*resume, "--config", str(file)])


def test_a_resumed_run_takes_what_is_of_the_moment_though_it_is_a_default(tmp_path):
    run = TrainConfig()
    run.run.out, run.optimizer.batch_size = tmp_path, 4
    run.run.report_to, run.run.push_to_hub = ("wandb",), "owner/name"
    save_yaml(run, tmp_path / "train.yaml")
    resume = ["train", "--resume", "--out", str(tmp_path)]
    kept = settings_to_resume(parse(resume))
    assert (kept.optimizer.batch_size, kept.run.report_to, kept.run.push_to_hub) == (4, ("wandb",), "owner/name")
    default = TrainConfig().run
    flags = ["--batch-size", "1", "--report-to", *default.report_to, "--push-to-hub", default.push_to_hub]
    asked = settings_to_resume(parse([*resume, *flags]))
    assert (asked.optimizer.batch_size, asked.optimizer.gradient_accumulation) == (1, 4)
    assert (asked.run.report_to, asked.run.push_to_hub) == (default.report_to, default.push_to_hub)


def test_a_saved_file_of_settings_is_read_by_the_command():
    file = FIXTURES / "run" / "train.yaml"
    command = parse(["train", "--config", str(file), "--phase", "1", "6"])
    assert command.model.pattern() == PiPattern(8, (5, 7), 3, sinks=2, phase=(1, 6))
    assert load_yaml(TrainConfig, file).model.layer_patterns == ("pi", "dense")
