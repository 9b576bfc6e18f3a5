"""The planner against exhaustive search on small contexts, and its promises on large ones."""

import itertools
import json
import re
from pathlib import Path
from typing import get_args

import pytest

from pi_attention import PiPattern
from pi_attention.accounting import cache_bytes, stack_cost
from pi_attention.bill import MODELS, bill
from pi_attention.cli.main import main
from pi_attention.cli.train import Train
from pi_attention.devices import DEVICES
from pi_attention.heads import coordinated_heads
from pi_attention.models import PiConfig
from pi_attention.planner import fewest_keys, longest_stretch, plan
from pi_attention.receptive_field import joint_coverage, receptive_field
from pi_attention.recommended import Goal, recommended
from pi_attention.stack import DENSE, stacked
from pi_attention.training.config import load_yaml


def fewest_by_search(context, hops, heads):
    """The fewest keys of all patterns, by trying each."""
    for keys in itertools.count(1):
        for window in range(1, keys + 1):
            skips = keys - window
            periods = range(1, context + 1) if skips else [1]
            for chosen in itertools.combinations_with_replacement(periods, heads):
                pattern = PiPattern(window, chosen if heads > 1 else chosen[0], skips)
                if receptive_field([pattern] * hops, context).covered() == context:
                    return keys


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_one_period_is_optimal(hops):
    for context in range(1, 50):
        found = fewest_keys(context, hops)
        assert receptive_field([found.pattern] * hops, context).covered() == context
        assert found.keys == fewest_by_search(context, hops, 1), context


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_two_periods_are_at_most_one_key_from_the_optimum(hops):
    for context in range(1, 20):
        found = fewest_keys(context, hops, heads=2)
        assert receptive_field([found.pattern] * hops, context).covered() == context
        assert found.keys - fewest_by_search(context, hops, 2) in (0, 1), context


def longest_by_search(budget, heads, least_window):
    """The longest stretch of one layer, by trying every window, number of skips, and period and phase of each head."""
    most = 0
    for window in range(least_window, budget + 1):
        for skips in range(budget - window + 1):
            bands = [(period, phase) for period in range(1, heads + 3) for phase in range(period)]
            for chosen in itertools.combinations_with_replacement(bands, heads):
                period, phase = zip(*chosen, strict=True)
                pattern = PiPattern(window, period, skips, phase=phase)
                most = max(most, joint_coverage(pattern, budget * heads + 1).stretch)
    return most


@pytest.mark.parametrize(("heads", "most"), [(1, 6), (2, 5), (3, 4)])
def test_the_longest_stretch_is_that_of_a_search(heads, most):
    for budget in range(1, most + 1):
        for least_window in range(1, budget + 1):
            found = longest_stretch(budget, heads, least_window=least_window)
            assert found.context == longest_by_search(budget, heads, least_window)
            assert found.context == joint_coverage(found.pattern, 1000).stretch
            assert found.keys <= budget and found.pattern.window >= least_window


def test_a_stretch_no_longer_than_the_context_has_the_widest_window():
    for heads, budget, least_window in itertools.product((1, 2, 3, 4), (3, 5, 8), (1, 3)):
        for context in range(1, 40):
            found = longest_stretch(budget, heads, least_window=least_window, context=context)
            longest = longest_stretch(budget, heads, least_window=least_window).context
            assert found.context == min(context, longest) <= joint_coverage(found.pattern, 1000).stretch
            assert found.keys <= budget and found.hops == 1
            assert found.pattern.window >= min(least_window, context)
            wider = min(found.pattern.window + 1, context)
            if wider <= budget and wider > found.pattern.window and longest >= context:
                assert wider + heads * (budget - wider) < context  # what w + 1 neighbours leave is too short


def test_longest_stretch_of_the_measured_form():
    found = longest_stretch(80, 4, sinks=4)
    assert found.pattern == coordinated_heads(16, 64, 4, sinks=4) and (found.context, found.keys) == (272, 80)
    assert longest_stretch(80, 1).pattern == PiPattern(80, 1, 0)
    with pytest.raises(ValueError, match="least_window=16 is more than budget=8 keys a query: raise"):
        longest_stretch(8, 4)
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        longest_stretch(8, 0, least_window=1)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        longest_stretch(8, 2, least_window=1, context=0)


@pytest.mark.parametrize("context", [1000, 131072, 1 << 20])
@pytest.mark.parametrize("heads", [1, 16])
def test_large_contexts_are_covered_exactly(context, heads):
    for hops in (2, 3, 5, 8):
        found = fewest_keys(context, hops, heads=heads)
        assert receptive_field([found.pattern] * hops, context).covered() == context
        if hops == 2 and heads == 1:
            assert abs(found.keys - 2 * context**0.5) < 3
            assert abs(found.pattern.window - context**0.5) < context**0.5 / 5


def test_budget_and_hops():
    assert plan(131072, 24, budget=256).hops == 6
    assert plan(131072, 24, budget=256, heads=16).hops == 3
    assert plan(131072, 24, hops=2).keys == 724
    assert plan(131072, 24, hops=2, sinks=4).pattern.sinks == 4
    with pytest.raises(ValueError, match=r"budget=100 .* takes 724: raise the budget or the hops"):
        plan(131072, 24, budget=100, hops=2)
    with pytest.raises(ValueError, match="hops=9 must lie between 1 and the number of layers, 4"):
        plan(1000, 4, hops=9)
    with pytest.raises(ValueError, match="give a budget"):
        plan(1000, 4)
    with pytest.raises(ValueError, match="context must be at least 1"):
        fewest_keys(0, 2)


def run(monkeypatch, capsys, *arguments, command="plan"):
    monkeypatch.setattr("sys.argv", ["pi-attention", command, *arguments])
    with pytest.raises(SystemExit) as done:
        main()
    return done.value.code, capsys.readouterr()


def test_command_prints_a_plan_that_loads_as_a_config(monkeypatch, capsys, tmp_path):
    out = tmp_path / "plan.yaml"
    sizes = ["--context", "4096", "--layers", "6", "--heads", "4", "--device", "h200"]
    code, printed = run(monkeypatch, capsys, *sizes, "--hops", "3", "--head-schedule", "--json", "--out", str(out))
    assert code == 0
    found = json.loads(printed.out)
    assert found["covered in these hops"] == found["context"] == 4096
    config = PiConfig(num_attention_heads=4, num_hidden_layers=6, hidden_size=64, **found["pattern"])
    assert receptive_field(config.patterns()[:3], 4096).covered() == 4096
    made = load_yaml(Train, out)
    assert made.model.pattern() == PiPattern.from_dict(found["pattern"])
    assert (made.model.window, made.model.layers, made.model.heads, made.data.context) == (config.window, 6, 4, 4096)
    code, printed = run(monkeypatch, capsys, *sizes, "--budget", "64")
    assert code == 0 and "of 6 layers" in printed.out and "--goal" in printed.out
    arguments = re.search(r"PiConfig\((window=.*, period=.*, skips=.*, sinks=0, phase=0)\)", printed.out)
    assert arguments and eval(f"PiConfig({arguments[1]})").pattern.reach
    code, printed = run(monkeypatch, capsys, "--layers", "0")
    assert code == 2 and "layers must be at least 1, got 0" in printed.err
    code, printed = run(monkeypatch, capsys, "--device", "abacus")
    assert code == 2 and "use one of ['h200']" in printed.err


def test_command_prints_the_bill_of_a_pattern(monkeypatch, capsys):
    asked = ["--context", "8192", "--gpus", "4", "--model", "1b", "--window", "128", "--period", "128", "--skips", "8"]
    code, printed = run(monkeypatch, capsys, *asked, "--json", command="bill")
    found, made = json.loads(printed.out), bill(MODELS["1b"], PiPattern(128, 128, 8), 8192, 4)
    assert code == 0 and found["halo"]["bytes"] == made.bytes and found["halo"]["received"] == made.received
    code, printed = run(monkeypatch, capsys, *asked, command="bill")
    assert "--gradient-checkpointing" in " ".join(printed.out.split())  # what the bill assumes, and train leaves out
    assert code == 0 and "fewest GPUs of 80 GiB" in printed.out
    layout = ["--dp", "2", "--tp", "4", "--zero", "2"]
    code, printed = run(monkeypatch, capsys, *asked, *layout, "--json", command="bill")
    found, made = json.loads(printed.out), bill(MODELS["1b"], PiPattern(128, 128, 8), 8192, 4, dp=2, tp=4, zero=2)
    assert code == 0 and found["halo"]["bytes"] == made.bytes and found["halo"]["fewest GPUs"] == 8
    layers = ["--layer-patterns", *["local"] * 4, "dense"]
    code, printed = run(monkeypatch, capsys, *asked, *layers, command="bill")
    assert code == 2 and "period=(128,) is of skips, and no layer has any" in printed.err
    code, printed = run(monkeypatch, capsys, *asked[:8], *layers, "--json", command="bill")
    found, made = json.loads(printed.out), bill(MODELS["1b"], ([PiPattern(128, 1, 0)] * 4 + [DENSE]) * 4, 8192, 4)
    assert code == 0 and found["halo"]["bytes"] == made.bytes and found["halo"]["received"] == made.received
    code, printed = run(monkeypatch, capsys, *asked, "--layer-patterns", *["local"] * 21, command="bill")
    assert code == 2 and "layer_patterns has 21 entries" in printed.err
    code, printed = run(monkeypatch, capsys, *asked, "--tp", "3", command="bill")
    assert code == 2 and "tp=3 must divide the 16 heads, 16 key heads" in printed.err
    code, printed = run(monkeypatch, capsys, "--context", "4", "--gpus", "5", command="bill")
    assert code == 2 and "gpus must be from 1 to context=4, got 5" in printed.err


def test_command_prints_a_coordinated_plan(monkeypatch, capsys, tmp_path):
    out = tmp_path / "plan.yaml"
    sizes = ["--context", "2048", "--layers", "8", "--heads", "4", "--coordinated"]
    code, printed = run(monkeypatch, capsys, *sizes, "--budget", "80", "--json", "--out", str(out))
    found = json.loads(printed.out)
    pattern = PiPattern.from_dict(found["pattern"])
    assert code == 0 and pattern == coordinated_heads(16, 64, 4)
    assert found["stretch of a layer"] == 272 and found["covered in these hops"] == 2048
    assert found["hops"] == receptive_field([pattern] * 8, 2048).layers_to_cover() == 8
    assert load_yaml(Train, out).model.pattern() == pattern
    code, printed = run(monkeypatch, capsys, *sizes, "--budget", "80", "--least-window", "40", "--layers", "2")
    assert code == 0 and "200 in one layer" in printed.out and "without a gate" in printed.out
    assert "better than 2 and 8" not in printed.out
    assert "PiConfig(window=40, period=4, skips=40, sinks=0, phase=[0, 1, 2, 3])" in printed.out
    assert "more than 2 layers" in printed.out
    code, printed = run(monkeypatch, capsys, *sizes, "--heads", "16")
    assert code == 0 and "period 4 was better than 2 and 8" in printed.out
    code, printed = run(monkeypatch, capsys, *sizes, "--hops", "2")
    assert code == 2 and "hops=2 asks for another plan than coordinated=True" in printed.err
    code, printed = run(monkeypatch, capsys, *sizes, "--budget", "8")
    assert code == 2 and "least_window=16 is more than budget=8" in printed.err


@pytest.mark.parametrize("goal", get_args(Goal))
def test_the_settings_of_a_goal_make_its_patterns(goal):
    for layers, heads, keys, sinks in ((12, 8, 80, 0), (6, 6, 320, 4), (5, 3, 7, 1), (1, 2, 2, 0)):
        form = recommended(goal, keys=keys, heads=heads, layers=layers, sinks=sinks)
        sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": 16 * heads}
        assert PiConfig(**form.settings, **sizes).patterns() == form.patterns(layers)
        near = [pattern for pattern in form.patterns(layers) if pattern.reach and pattern.reach < 2**20]
        assert len(near) == layers - (layers + 5) // 6 * (goal in ("quality", "few-products")) or layers < 6
        assert all(pattern.window + pattern.skips == keys and pattern.sinks == sinks for pattern in near)
    with pytest.raises(ValueError, match="keys must be at least 2, got 1"):
        recommended(goal, keys=1, heads=4)


def test_a_form_says_what_of_it_was_not_measured():
    assert "not measured" not in recommended("quality", keys=80, heads=4, layers=24, every=12).scale
    few = recommended("few-products", keys=80, heads=4, layers=24, every=12)
    assert few.scale.endswith("One such layer in 12 was not measured")
    assert "in 4 was not measured" in recommended("quality", keys=80, heads=4, layers=4).scale
    assert "not measured" not in recommended("quality", keys=80, heads=4, every=1).scale  # dense attention
    assert recommended("least", keys=80, heads=1, every=12) == recommended("least", keys=80, heads=1)
    with pytest.raises(ValueError, match="heads=1 shares no distance, as goal='bounded-cache' needs"):
        recommended("bounded-cache", keys=80, heads=1)


def test_goals_cost_less_from_the_best_to_the_cheapest():
    costs = [
        stack_cost(recommended(goal, keys=320, heads=8).patterns(12), 131072, heads=8, kv_heads=8, head_dim=64)
        for goal in get_args(Goal)
    ]
    products = [cost["flops"] / cost["dense flops"] for cost in costs]
    caches = [cost["cache bytes"] / cost["dense cache bytes"] for cost in costs]
    assert 1 / 6 < products[0] < 0.18 and 1 / 24 < products[1] < 0.05 and max(products[2:]) < 0.005
    assert caches[0] == caches[1] > 1 / 6 and caches == sorted(caches, reverse=True) and caches[3] < 0.01
    with pytest.raises(ValueError, match="goal='speed' is unknown: use one of"):
        recommended("speed", keys=320, heads=8)


def test_command_takes_the_form_of_a_goal(monkeypatch, capsys, tmp_path):
    out = tmp_path / "plan.yaml"
    sizes = ["--context", "4096", "--layers", "6", "--heads", "4", "--budget", "80"]
    code, printed = run(monkeypatch, capsys, *sizes, "--goal", "few-products", "--out", str(out))
    form = recommended("few-products", keys=80, heads=4, layers=6)
    assert code == 0 and "few-products (chosen)" in printed.out and form.measured in printed.out
    model = load_yaml(Train, out).model
    assert stacked(model.layer_patterns, model.pattern(), 6) == form.patterns(6)
    arguments = re.search(r"PiConfig\((.*)\)", printed.out)
    assert arguments and eval(f"PiConfig({arguments[1]}, num_hidden_layers=6)").layer_patterns == list(form.kinds)
    code, printed = run(monkeypatch, capsys, *sizes, "--goal", "quality", "--every", "12", "--layers", "12", "--json")
    assert json.loads(printed.out)["settings"]["layer_patterns"] == [*["local"] * 6, "dense", *["local"] * 5]
    code, printed = run(monkeypatch, capsys, *sizes, "--goal", "quality", "--heads", "1")
    assert code == 0 and "least" in printed.out and "bounded-cache" not in printed.out  # no head to share with
    code, printed = run(monkeypatch, capsys, "--goal", "least", "--every", "12")
    assert code == 2 and "every=12 is of --goal quality or few-products" in printed.err
    code, printed = run(monkeypatch, capsys, *sizes, "--goal", "quality", "--json")
    found = json.loads(printed.out)
    assert code == 0 and found["settings"] == {
        "window": 80,
        "skips": 0,
        "layer_patterns": ["local"] * 3 + ["dense"] + ["local"] * 2,
    }
    assert found["costs"]["least"]["cache bytes"] == 6 * cache_bytes(
        PiPattern(80, 1, 0), 4096, kv_heads=4, head_dim=128
    )
    code, _ = run(monkeypatch, capsys, "--layers", "1", "--goal", "quality", "--out", str(tmp_path / "one.yaml"))
    assert code == 0
    load_yaml(Train, tmp_path / "one.yaml").check_unused()  # a window would be of no layer
    for more, said in (
        (["--hops", "2"], "hops=2 is of plans without a goal"),
        (["--device", "h200"], "device='h200' is of plans without a goal"),
        (["--budget", "1"], "budget=1 must be at least 2"),
    ):
        code, printed = run(monkeypatch, capsys, "--goal", "least", *more)
        assert code == 2 and said in printed.err


def test_devices_are_those_of_the_committed_benchmarks():
    for device in DEVICES.values():
        name = f"gpu-{device.name.replace(' ', '-').lower()}.json"
        result = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / name).read_text())
        (row,) = [r for r in result["rows"] if (r["S"], r["D"], r["pattern"]) == (32768, 128, "256,256,16")]
        assert result["gpu"] == device.name
        assert device.bytes_per_second == pytest.approx(result["copy bytes/s"], rel=0.01)
        assert device.flops_per_second == pytest.approx(result["matrix flop/s"], rel=0.01)
        assert device.forward_over_floor == pytest.approx(row["forward over floor"], rel=0.01)
        assert device.training_over_floor == pytest.approx(row["forward+backward over floor"], rel=0.01)
