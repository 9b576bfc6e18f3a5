"""The experiments are fair, resumable, and measure what they say."""

import pytest
import torch

from experiments import recall, runner
from experiments.variants import VARIANTS, config, freeze_half
from pi_attention import PiPattern
from pi_attention.models import PiForCausalLM

SIZES = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PATTERN = PiPattern(16, 16, 8)


def test_variants_have_the_same_parameters_and_keys():
    counts = {}
    for variant in VARIANTS:
        made = config(variant, PATTERN, 256, **SIZES)
        counts[variant] = sum(p.numel() for p in PiForCausalLM(made).parameters())
        pattern = made.patterns()[0]
        keys = pattern.window + (pattern.skips or 0) + pattern.sinks
        if variant not in ("dense", "ring-local, same window"):
            assert keys == PATTERN.window + PATTERN.skips, variant
    assert max(counts.values()) - min(counts.values()) < 0.005 * min(counts.values()), counts
    with pytest.raises(ValueError, match="variant='other' is unknown"):
        config("other", PATTERN, 256, **SIZES)


def test_the_fixed_gate_is_one_half_and_stays():
    model = PiForCausalLM(config("pi, fixed half", PATTERN, 256, **SIZES))
    freeze_half(model)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".gate." in name)
    logits = model.model.layers[0].self_attn.gate(torch.randn(1, 9, 64))
    assert torch.equal(logits, torch.zeros_like(logits))


def test_a_run_skips_finished_rows_and_survives_an_error(tmp_path):
    asked = []

    def measure(settings):
        asked.append(settings["seed"])
        if settings["seed"] == 2 and len(asked) < 4:
            raise RuntimeError("cut off")
        return {"accuracy": settings["seed"] / 10}

    rows = [{"seed": seed} for seed in range(4)]
    with pytest.raises(RuntimeError):
        runner.run("toy", rows, measure, tmp_path)
    assert [row["settings"]["seed"] for row in runner.load("toy", tmp_path)] == [0, 1]
    done = runner.run("toy", rows, measure, tmp_path)
    assert asked == [0, 1, 2, 2, 3] and len(done) == 4


def test_interval_is_student_s():
    mean, half = runner.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5)


def test_recall_sequences_ask_for_what_was_shown():
    ids, labels = recall.sequences(4, 64, 5, torch.Generator().manual_seed(0))
    assert int((labels != recall.IGNORE).sum()) == 20
    for row, position in (labels != recall.IGNORE).nonzero().tolist():
        key, value = ids[row, position - 1], labels[row, position]
        shown = int((ids[row] == key).nonzero()[0])
        assert shown < position - 1 and ids[row, shown + 1] == value == ids[row, position]
    ids, values = recall.at_lag(8, 64, 17, torch.Generator().manual_seed(0))
    assert torch.equal(ids[:, -18], values) and torch.equal(ids[:, -19], ids[:, -1])


def test_a_recall_row_is_repeatable():
    settings = {"variant": "ring-local, same keys", "window": 8, "period": 8, "skips": 4, "layers": 2, "context": 32,
                "pairs": 2, "steps": 2, "batch": 4, "rate": 1e-3, "seed": 0, "lags": [3, 25]}  # fmt: skip
    result = recall.measure(settings)
    assert set(result["accuracy"]) == {"3", "25"} and result == recall.measure(settings)
