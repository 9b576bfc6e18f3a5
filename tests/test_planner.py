"""The planner against exhaustive search on small contexts, and its promises on large ones."""

import itertools
import json
import re
from pathlib import Path

import pytest

from pi_attention import PiPattern
from pi_attention.cli.main import main
from pi_attention.cli.train import Train
from pi_attention.devices import DEVICES
from pi_attention.models import PiConfig
from pi_attention.planner import fewest_keys, plan
from pi_attention.receptive_field import receptive_field
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


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["pi-attention", "plan", *arguments])
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
    assert code == 0 and "of 6 layers" in printed.out
    arguments = re.search(r"PiConfig\((window=.*, period=.*, skips=.*, sinks=0, phase=0)\)", printed.out)
    assert arguments and eval(f"PiConfig({arguments[1]})").pattern.reach
    code, printed = run(monkeypatch, capsys, "--layers", "0")
    assert code == 2 and "layers must be at least 1, got 0" in printed.err
    code, printed = run(monkeypatch, capsys, "--device", "abacus")
    assert code == 2 and "use one of ['h200']" in printed.err


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
