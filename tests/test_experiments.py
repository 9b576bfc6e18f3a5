"""The experiments are fair, resumable, and measure what they say."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.intervals import interval
from experiments import runner
from experiments.__main__ import main
from experiments.language_losses import by_document
from experiments.pretrained import ALIKE
from experiments.registry import EXPERIMENTS
from experiments.rows import append, load
from experiments.span_finders import pattern_of
from experiments.texts import blocks
from experiments.variants import (
    BASELINE,
    COORDINATED,
    COORDINATED_HEADS,
    HYBRIDS,
    RANDOM_BLOCKS,
    SIDE,
    VARIANTS,
    config,
    random_blocks,
    specialise,
)
from pi_attention import PiPattern
from pi_attention.models import PiForCausalLM
from pi_attention.stack import DENSE
from report import gains

OWN = ("pi", "coordinated 4", "coordinated heads + sinks")
"""One of these is among the variants of each experiment."""
SIZES = {"hidden": 64, "layers": 2, "heads": 4, "window": 16, "period": 16, "skips": 8, "context": 256}


def test_variants_have_the_same_parameters_and_keys():
    counts = {}
    for variant in (*VARIANTS, *COORDINATED, *HYBRIDS):
        made = config({"variant": variant, **SIZES}, vocab_size=50)
        counts[variant] = sum(p.numel() for p in PiForCausalLM(made).parameters())
        pattern = made.patterns()[0]
        keys = pattern.window + (pattern.skips or 0) + pattern.sinks
        if variant not in ("dense", "ring-local, same window"):
            assert keys == SIZES["window"] + SIZES["skips"], variant
    assert max(counts.values()) - min(counts.values()) < 0.02 * min(counts.values()), counts
    with pytest.raises(ValueError, match="variant='other' is unknown"):
        config({"variant": "other", **SIZES})


def test_the_variants_of_the_committed_results_are_what_they_were():
    saved = json.loads((Path(__file__).parent / "fixtures" / "variants.json").read_text())
    assert set(VARIANTS) < set(saved)
    for variant, said in saved.items():
        made = config({"variant": variant, **SIZES}, vocab_size=50)
        assert {name: getattr(made, name) for name in said} == said, variant
        assert (made.phase, made.ring) == (0, False)


def test_coordinated_heads_see_each_lag_of_the_same_keys_together():
    for variant in COORDINATED[:4]:
        pattern = config({"variant": variant, **SIZES}).pattern
        lags = [lag for band in pattern.skip_bands() for lag in band.lags()]
        assert sorted(lags) == list(range(pattern.window, pattern.window + 4 * pattern.skips)), variant
    assert pattern.window == SIZES["window"] // 2
    named = pattern_of({"variant": COORDINATED_HEADS, **SIZES}, heads=8)
    assert (named.window, named.period, named.skips, named.phase) == (4, 4, 20, (0, 1, 2, 3, 0, 1, 2, 3))


def test_one_layer_of_a_hybrid_sees_everything():
    for variant in HYBRIDS:
        made = config({"variant": variant, **SIZES, "layers": 6}, causal=False)
        whole = made.patterns()[3]
        others = {pattern for layer, pattern in enumerate(made.patterns()) if layer != 3}
        first = BASELINE if variant.startswith("ring") else COORDINATED_HEADS
        first = "pi, dilated heads" if variant.startswith("dilated") else first
        assert others == {config({"variant": first, **SIZES}, causal=False).pattern}, variant
        if variant.endswith("+ dense layer"):
            assert whole == replace(DENSE, causal=False)
        else:
            assert whole == PiPattern(4, 4, None, causal=False, phase=(0, 1, 2, 3))
        assert not made.gate


def test_sinks_take_the_place_of_skips_or_of_the_window():
    settings = {**SIZES, "sinks": 6}
    for variant, window, skips in (
        ("window + sinks", 18, 0),
        ("pi + sinks", 16, 2),
        ("pi, coprime heads + sinks", 16, 2),
        ("pi, coordinated heads + sinks", 4, 14),
    ):
        pattern = config({"variant": variant, **settings}).patterns()[0]
        assert (pattern.window, pattern.skips, pattern.sinks) == (window, skips, 6), variant


def test_the_fixed_gate_is_one_half_and_stays():
    variant = "pi, fixed half"
    settings = {"variant": variant, **SIZES}
    model = specialise(PiForCausalLM(config(settings, vocab_size=50)), settings)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".gate." in name)
    logits = model.model.layers[0].self_attn.gate(torch.randn(1, 9, 64))
    assert torch.equal(logits, torch.zeros_like(logits))


def test_random_blocks_have_the_keys_of_the_others():
    mask = random_blocks(256, window=16, skips=12, generator=torch.Generator().manual_seed(0))
    query = torch.arange(256)
    assert not mask.triu(1).any() and mask[SIDE:, :SIDE].all()
    assert (mask[64:].sum(1) == 16 + 12).all()
    assert all(mask[q, q - 15 : q + 1].all() for q in query[16:].tolist())
    settings = {"variant": RANDOM_BLOCKS, "seed": 0, **SIZES, "layers": 1}
    torch.manual_seed(0)
    model = specialise(PiForCausalLM(config(settings, vocab_size=50)), settings)
    seen = random_blocks(256, 16, 8, torch.Generator().manual_seed(0))[200]
    ids = torch.randint(50, (1, 256))
    for position, reaches in ((int((~seen[:185]).nonzero()[7]), False), (int(seen.nonzero()[5]), True)):
        other = ids.clone()
        other[0, position] = (ids[0, position] + 1) % 50
        same = torch.equal(model(ids, use_cache=False).logits[0, 200], model(other, use_cache=False).logits[0, 200])
        assert same != reaches


def test_rows_are_lines_and_one_that_was_cut_off_is_measured_again(tmp_path):
    append("toy", {"settings": 1}, tmp_path)
    append("toy", {"settings": 2}, tmp_path)
    path = tmp_path / "toy.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(UserWarning, match=r"toy\.jsonl: the last line is incomplete"):
        assert load("toy", tmp_path) == [{"settings": 1}]
    append("toy", {"settings": 3}, tmp_path)
    (tmp_path / "toy.json").write_text('{"experiment": "toy", "rows": [{"settings": 0}]}')  # the older form
    assert [row["settings"] for row in load("toy", tmp_path)] == [0, 1, 3]
    path.write_bytes(b"torn\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"toy\.jsonl, line 1 is no JSON"):
        load("toy", tmp_path)


def test_losses_are_kept_by_document():
    pieces = [np.arange(7), np.arange(100, 102), np.arange(200, 260)]  # the second is too short for a block
    ids, owners = blocks(pieces, 3, 5)
    assert ids[:, 0].tolist() == [0, 3, 200, 203, 206] and owners == [0, 0, 2, 2, 2]
    assert by_document(ids[:, 1:].double(), owners) == [3.0, 204.5]


def test_interval_is_student_s():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5)
    assert math.isnan(interval([1.0])[1])


def test_pictures_show_what_was_measured(tmp_path):
    lra = gains.rows_of("lra", {"task": "image"})
    accuracy = [lra[variant][0]["result"]["test"] for variant in ("pi", BASELINE)]
    assert accuracy[0] > accuracy[1] and gains.gains()["images as pixels"]["pi"][0] > 0  # higher is better
    lines = {BASELINE: [(1.0, 4.0)], "pi": [(1.0, 3.0)]}
    assert gains.relative(lines) == {BASELINE: [(1.0, 1.0)], "pi": [(1.0, 0.75)]}
    error = gains.rows_of("series", {"task": "glucose"})
    assert error["pi"][0]["result"]["test"] > error[BASELINE][0]["result"]["test"]
    assert gains.gains()["glucose"]["pi"][0] < 0  # lower is better
    gains.draw(tmp_path)
    shown = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert len(shown) == 4 and "images as pixels" in shown["gains.svg"] and "planned" in shown["recall_by_lag.svg"]


def first_cells(experiment):
    """The experiment with one smoke cell of each task only, with a pattern of its own."""
    cells = experiment.cells("smoke")
    own = next(name for name in OWN if any(cell["variant"] == name for cell in cells))
    groups = {cell.get("task", cell.get("images")): cell for cell in cells if cell["variant"] == own}
    return replace(experiment, cells=lambda scale: list(groups.values()), rates=experiment.rates[:1])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_runs_at_toy_size(name, made_up, tmp_path):
    rows = runner.run([first_cells(EXPERIMENTS[name])], "smoke", made_up, folder=tmp_path, seeds=1)[name]
    for row in rows:
        assert math.isfinite(row["result"]["test"]) and row["result"]["parameters"] > 0
        assert row["settings"]["variant"] in OWN
    steps = {"steps": rows[0]["result"]["steps"]} if "seconds" in rows[0]["settings"] else {}
    again = EXPERIMENTS[name].measure(rows[0]["settings"] | steps, made_up)
    if name not in ("cost", "serving_cost"):  # which measure time
        assert again["test"] == rows[0]["result"]["test"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_variant_runs_in_processes(name, made_up, tmp_path, request):
    if not request.config.getoption("--smoke"):
        pytest.skip("make experiments-smoke runs it")
    experiment = replace(EXPERIMENTS[name], rates=EXPERIMENTS[name].rates[:1])
    rows = runner.run([experiment], "smoke", made_up, folder=tmp_path, workers=2, seeds=1)[name]
    assert len(rows) == len(experiment.cells("smoke"))
    assert {BASELINE, ALIKE} & {row["settings"]["variant"] for row in rows} or name == "period_sweep"
    assert Path(tmp_path / f"{name}.jsonl").exists()


def test_the_command_lists_runs_and_names_what_is_wrong(made_up, tmp_path, capsys):
    main(["run", "listops", "--scale", "smoke", "--data", str(made_up), "--results", str(tmp_path), "--seeds", "1"])
    main(["list", "--scale", "smoke", "--results", str(tmp_path)])
    assert f"{len(load('listops', tmp_path))} " in capsys.readouterr().out and load("listops", tmp_path)
    for wrong, said in (
        (["other"], "'other' is no experiment"),
        (["recall", "--workers", "0"], "workers must be at least 1"),
        (["recall", "--seeds", "0"], "seeds must be at least 1"),
        (["recall", "--minutes", "0"], "minutes=0.0 leaves no time"),
        (["--dataset", "a/b"], "dataset needs the name"),
        (["recall", "--dataset", "a/b"], "trains on no corpus"),
        (["recall", "--results", __file__], "cannot be a folder"),
        (["recall", "--data", __file__], "is no folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["run", *wrong])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["list", "--results", __file__])
    assert "is no folder" in capsys.readouterr().err
