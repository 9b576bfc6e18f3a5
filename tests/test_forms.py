"""Forms spend the same keys, hybrids have one layer in n that sees everything, and what is measured is what is said."""

import math

import pytest
import torch

from experiments import forms, serving_cost
from experiments.forms import BASELINE, EVERY, FUSIONS, WHOLE
from experiments.language_forms import EXPERIMENTS, FUSED, law
from experiments.language_forms import forms as of_forms
from experiments.language_modelling import shares, train
from experiments.recurrence import by_recurrence, recurrence
from experiments.training import PROBED, Pace, fit, fit_by_length, steps_within
from experiments.variants import config
from pi_attention.models import PiForCausalLM
from pi_attention.stack import DENSE

SIZES = {"hidden": 64, "layers": 12, "heads": 8, "keys": 40, "context": 1024}


def lags(pattern):
    return sorted(lag for band in pattern.skip_bands() for lag in band.lags())


def test_forms_have_the_same_keys_and_parameters():
    counts = {}
    for form, patterns in forms.single_layers(40, 8, 1024).items():
        for pattern in patterns:
            assert pattern == DENSE or pattern.window + pattern.skips == 40, form
        for fusion in FUSIONS if form in FUSED else [""]:
            made = config({"variant": form + fusion, **SIZES}, vocab_size=50)
            counts[form + fusion] = sum(p.numel() for p in PiForCausalLM(made).parameters())
            assert (made.gate, made.fusion) == {"": (False, "gate"), ", gate": (True, "gate")}.get(
                fusion, (True, "mass")
            )
            assert made.patterns() == (patterns * 12)[:12]
    assert max(counts.values()) - min(counts.values()) < 0.02 * min(counts.values()), counts
    with pytest.raises(ValueError, match="variant='coordinated 5' is unknown: use one of"):
        config({"variant": "coordinated 5", **SIZES})


def test_coordinated_forms_see_each_lag_once_for_each_group_of_heads():
    found = forms.single_layers(40, 8, 1024)
    for period in (2, 4, 8):
        (pattern,) = found[f"coordinated {period}"]
        assert lags(pattern) == sorted([*range(8, 8 + period * 32)] * (8 // period))
    assert len(set(lags(found["period 4"][0]))) == 32  # the same lags in every head
    ring, coordinated = found["ring-local and coordinated 4 by layer"]
    assert [ring] == found[BASELINE] and [coordinated] == found["coordinated 4"]
    assert {band.stride for band in found["coordinated 4 and 16 by head"][0].skip_bands()} == {4, 16}


def test_a_hybrid_has_one_layer_in_n_that_sees_everything():
    for whole, period in WHOLE.items():
        for n in EVERY:
            made = config({"variant": f"{BASELINE} + {whole}, 1 in {n}", **SIZES}, vocab_size=50)
            local = forms.single_layers(40, 8, 1024)[BASELINE][0]
            others = [pattern for pattern in made.patterns() if pattern != local]
            assert len(others) == 12 // n
            if period is None:
                assert set(others) == {DENSE}
            else:
                assert all((p.skips, set(p.phases)) == (None, set(range(period))) for p in others)


def test_cells_are_distinct_and_have_their_controls():
    for experiment in EXPERIMENTS:
        for scale in ("smoke", "small"):
            cells = experiment.cells(scale)
            assert all(cell not in cells[:number] for number, cell in enumerate(cells)), experiment.name
            for cell in cells:
                assert {**cell, "variant": BASELINE} in cells or cell["variant"] == "dense"
                config(cell, vocab_size=50).patterns()
    cells = law("small") + [cell for cell in of_forms("small") if cell["heads"] == 4]
    of_length = {(cell["context"], cell["keys"]) for cell in cells if cell["variant"] == "coordinated 4"}
    assert len(of_length) == 16
    assert {cell["context"] for cell in cells if cell["variant"] == "dense"} == {n for n, _ in of_length}


def test_recurrence_finds_the_last_earlier_occurrence():
    ids = torch.randint(3, (4, 40))
    distance, repeated = recurrence(ids)
    for row, tokens in enumerate(ids.tolist()):
        for place in range(2, 40):
            pair = tokens[place - 2 : place]
            earlier = [p for p in range(2, place) if tokens[p - 2 : p] == pair]
            assert distance[row, place - 2] == (place - earlier[-1] if earlier else 0)
            assert repeated[row, place - 2] == bool(earlier and tokens[earlier[-1]] == tokens[place])


def test_losses_are_kept_by_recurrence():
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 1, 2, 5]])
    losses = torch.arange(9.0)[None]  # of the tokens from the second on
    assert by_recurrence(losses, ids, keys=4) == {
        "new": [3.4, 5],  # after (1, 2), (2, 3), (3, 4), (4, 1) and (3, 1)
        "within": [8.0, 1],
        "beyond": [5.5, 2],
        "beyond, repeated": [5.0, 1],
    }


def tiny():
    torch.manual_seed(0)
    model = PiForCausalLM(config({"variant": BASELINE, **SIZES, "layers": 1}, vocab_size=50))

    def batches(length):
        generator = torch.Generator().manual_seed(1)
        while True:
            ids = torch.randint(50, (1, length), generator=generator)
            yield {"input_ids": ids, "labels": ids}

    return model, batches


def test_half_of_the_steps_are_at_the_shortest_length():
    assert shares({"context": 64}) == {64: 1.0}
    assert shares({"context": 64, "shorter first": [16, 32]}) == {16: 0.5, 32: 0.25, 64: 0.25}
    model, batches = tiny()
    asked = []

    def noted(length):
        for batch in batches(length):
            asked.append(batch["input_ids"].shape[1])
            yield batch

    last, pace = fit_by_length(model, noted, {16: 2, 32: 1}, rate=1e-3)
    assert asked == [16, 16, 32] and math.isfinite(last) and math.isnan(pace)


def test_training_for_seconds_takes_as_many_steps_as_its_speed_says(monkeypatch):
    model, batches = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    now = iter(range(10, 100, 5))
    monkeypatch.setattr("experiments.training.now", lambda: float(next(now)))
    assert steps_within(model, batches(8), seconds=2.0) == 2 * PROBED // 5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    pace = Pace(after=2)
    fit(model, batches(8), steps=12, rate=1e-3, pace=pace)
    assert pace.steps_a_second == 2.0
    pieces = [torch.arange(900).numpy() % 50]
    settings = {"context": 32, "shorter first": [16], "tokens": 32, "rate": 1e-3, "seed": 0}
    monkeypatch.setattr("experiments.language_modelling.steps_within", lambda model, batches, seconds: int(seconds))
    assert train(model, settings | {"seconds": 6}, pieces)["steps"] == [3, 3]
    assert train(model, settings | {"seconds": 6, "steps": [1, 2]}, pieces)["steps"] == [1, 2]  # measured again
    assert train(model, settings | {"steps": 4}, pieces)["steps"] == [2, 2]


def test_what_a_hybrid_costs_to_serve_lies_between_its_kinds_of_layers():
    cell = serving_cost.cells("smoke")[0] | {"context": 1000, "chunk": 250, "seed": 0}
    variants = BASELINE, f"{BASELINE} + dense, 1 in 6", "dense"
    rows = [serving_cost.measure(cell | {"variant": variant}, None) for variant in variants]
    window, mixed, dense = (row["cache bytes"] for row in rows)
    assert window < mixed < dense
    assert mixed == pytest.approx(5 / 6 * window + 1 / 6 * dense)
