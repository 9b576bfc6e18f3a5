"""Quality against cost: made-up rows make the points and the front that they should."""

import pytest

from experiments import language_forms
from experiments.forms import BASELINE
from report import pareto

CELLS = [cell for cell in language_forms.hybrids("small") if cell["variant"] != "dilated heads"]


def made_up(perplexity, cells=CELLS):
    return [
        (cell, [{"settings": {**cell, "seed": n}, "result": {"test": perplexity[cell["variant"]] + n}} for n in (0, 1)])
        for cell in cells
        if cell["variant"] in perplexity
    ]


def test_shares_of_the_cost_are_those_of_the_layers():
    of = {cell["variant"]: pareto.shares(cell) for cell in CELLS}
    assert of["dense"] == (1.0, 1.0)
    window, kept = of[BASELINE]
    assert window == pytest.approx(80 / (pareto.LENGTH / 2), rel=1e-3) and kept == 79 / pareto.LENGTH
    for n in (6, 12, 4):
        products, tokens = of[f"{BASELINE} + dense, 1 in {n}"]
        assert (products, tokens) == pytest.approx((1 / n + (1 - 1 / n) * window, 1 / n + (1 - 1 / n) * kept))
    quarter, tokens = of[f"{BASELINE} + coordinated 4, 1 in 6"]
    assert quarter == pytest.approx(1 / 24, rel=0.05) and tokens == of[f"{BASELINE} + dense, 1 in 6"][1]


def test_points_are_paired_with_dense_attention():
    found = pareto.points(made_up({"dense": 4.0, BASELINE: 5.0}))
    assert {point.name for point in found} == {"window", "dense"}
    gaps = {point.name: point.gaps for point in found}
    assert gaps["dense"] == (0.0, 0.0) and gaps["window"] == pytest.approx((25.0, 20.0))
    assert pareto.points(made_up({BASELINE: 5.0})) == []


def test_the_front_has_what_nothing_beats_in_both():
    half, twelfth = f"{BASELINE} + dense, 1 in 6", f"{BASELINE} + dense, 1 in 12"
    found = pareto.points(made_up({"dense": 4.0, BASELINE: 5.0, half: 3.9, twelfth: 3.8, "coordinated 4": 4.5}))
    for cost in ("products", "cache"):
        names = [point.name for point in pareto.front(found, cost)]
        assert names[-2:] == ["coordinated 4", "window + dense, 1 in 12"]
    assert names[0] == "window"  # it keeps fewer tokens than coordinated heads


def test_the_picture_has_a_panel_for_each_cost_with_every_form():
    found = pareto.points(made_up({"dense": 4.0, BASELINE: 5.0, "coordinated 4": 4.5}))
    for axes in pareto.picture(found).axes:
        assert len(axes.containers) == 3 and "131,072" in axes.get_xlabel()
