"""The patterns of a stack of layers: by kind, in a configuration, in a run, and what they cost together."""

import io
import re

import pytest
from rich.console import Console

from pi_attention import PiPattern, coordinated_heads
from pi_attention.accounting import attention_flops, dense_flops
from pi_attention.cli.bill import Bill
from pi_attention.cli.inspect import Inspect, _cost_of_the_stack
from pi_attention.models import PiConfig
from pi_attention.stack import DENSE, stacked
from pi_attention.training.config import ModelSettings, TrainConfig
from pi_attention.training.train import facts

PATTERN = coordinated_heads(16, 64, 4, sinks=2)
WINDOWS = ["local"] * 3


def test_kinds_are_repeated_over_the_layers():
    found = stacked(["pi", "local", "all-skips", "dense", {"skips": 3}], PATTERN, 7)
    alone = PiPattern(16, 1, 0, sinks=2)
    assert found[:4] == [PATTERN, alone, coordinated_heads(16, None, 4, sinks=2), DENSE]
    assert found[4:] == [coordinated_heads(16, 3, 4, sinks=2), PATTERN, alone]


def test_unknown_kinds_and_skips_that_are_not_there_are_errors():
    with pytest.raises(ValueError, match='holds \'every\': use "pi", "local", "all-skips", "dense", or a dict'):
        stacked(["every"], PATTERN, 2)
    with pytest.raises(ValueError, match=r'holds "all-skips", and skips=0'):
        stacked(["local", "all-skips"], PiPattern(4, 1, 0), 2)


def test_a_configuration_with_all_skips_in_one_layer():
    sizes = {"num_hidden_layers": 6, "num_attention_heads": 8, "window": 80}
    config = PiConfig(**sizes, layer_patterns=[*WINDOWS, "all-skips", "local", "local"])
    assert config.patterns()[3] == coordinated_heads(80, None, 8)
    assert config.layer_types[2:4] == ["sliding_attention", "full_attention"]
    measured = PiConfig(**sizes, layer_patterns=[*WINDOWS, {"window": 16, "skips": None}, "local", "local"])
    assert measured.patterns()[3] == coordinated_heads(16, None, 8, 4)


def test_a_run_with_all_skips_refuses_a_number_of_them():
    model = ModelSettings(window=80, layer_patterns=("local", "all-skips"), gate=True)
    config = TrainConfig(model=model)
    config.check()
    config.check_unused()
    model.skips = 9
    with pytest.raises(ValueError, match='skips=9 is of a "pi" layer, and there is none: leave it out'):
        config.check_unused()
    model.skips = 0
    with pytest.raises(ValueError, match='"all-skips", and skips=0'):
        config.check()


@pytest.mark.parametrize("command", [Inspect, Bill])
def test_commands_refuse_settings_that_no_layer_has(command):
    console = Console(file=io.StringIO())
    for settings, message in (
        ({"layer_patterns": ("dense",), "window": 64}, "window=64 is of a window, and all layers are dense"),
        ({"layer_patterns": ("local", "dense"), "skips": 9}, "skips=9 is of skips, and no layer has any"),
        ({"layer_patterns": ("local", "all-skips"), "skips": 9}, 'skips=9 is of a "pi" layer, and there is none'),
    ):
        with pytest.raises(ValueError, match=message):
            command(**settings).execute(console)
    with pytest.raises(ValueError, match="layer_patterns has 81 entries"):
        command(layer_patterns=("local",) * 81, **({"layers": 80} if command is Inspect else {})).execute(console)


def test_a_run_says_what_its_layers_see():
    lines = facts(5000, stacked(["local", "dense"], PATTERN, 3), 512, 9000, 900)
    assert lines[0].startswith("5,000 parameters, 9,000 training and 900 validation tokens, context 512")
    assert lines[1:] == [
        "layers 0, 2: a token sees the last 16 tokens, the first 2",
        "layer 1: a token sees every token up to itself",
    ]
    assert facts(1, [PATTERN] * 2, 512, 1, 1)[1].startswith("each layer: a token sees the last 16 tokens, 64 keys at")


def test_what_a_hybrid_costs_beside_dense_layers():
    stack, *_ = Inspect(window=80, heads=4, layer_patterns=("local", "dense", "local"))._describe()
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(_cost_of_the_stack(stack, 2048, 4, 2, 64))
    shares = [float(share) for share in re.findall(r"([\d.]+)% of dense", console.export_text())]
    flops = sum(attention_flops(pattern, 2048, heads=4, head_dim=64) for pattern in stack)
    products = flops / dense_flops(2048, heads=4, head_dim=64) / 3
    kept, read = (2 * 79 + 2048) / 3 / 2048, (2 * 80 + 2048) / 3 / 2048
    assert shares == pytest.approx([100 * products, 100 * kept, 100 * read], abs=0.005)


def test_inspect_has_as_many_layers_as_kinds_unless_it_is_told():
    assert len(Inspect(layer_patterns=("local", "dense"))._describe()[0]) == 2
    assert len(Inspect(layer_patterns=("local", "dense"), layers=5)._describe()[0]) == 5
    with pytest.raises(ValueError, match="layer_patterns has 2 entries, and layers=1"):
        Inspect(layer_patterns=("local", "dense"), layers=1)._describe()


def test_what_the_library_reads_follows_from_changed_settings(tmp_path):
    PiConfig(window=4, num_hidden_layers=2, layer_patterns=["local", "dense"]).save_pretrained(tmp_path)

    def words(config):
        return config.layer_types, config.sliding_window

    slides, full = "sliding_attention", "full_attention"
    for changes, types, window in (
        ({"layer_patterns": ["dense"]}, [full, full], None),
        ({"window": 10}, [slides, full], 10),
        ({"num_hidden_layers": 4}, [slides, full, slides, full], 4),
        ({"sinks": 1}, [full, full], None),
    ):
        loaded, unused = PiConfig.from_pretrained(tmp_path, **changes, other=1, return_unused_kwargs=True)
        assert words(loaded) == (types, window) and unused == {"other": 1}
        changed = PiConfig.from_pretrained(tmp_path)
        for name, value in changes.items():
            setattr(changed, name, value)
        assert words(changed) == (types, window)
    with pytest.raises(ValueError, match="window must be at least 1"):
        PiConfig.from_pretrained(tmp_path, window=0)
    with pytest.raises(ValueError, match="sliding_window=3 follows from the patterns: change window"):
        PiConfig.from_pretrained(tmp_path, sliding_window=3)
    config = PiConfig(num_attention_heads=8, window=4, skips=0, num_hidden_layers=2)
    config.phase, config.period, config.skips = [0] * 4, [1, 2, 3, 4], None  # of four heads
    config.num_attention_heads = 4
    assert words(config) == ([full, full], None)


def test_an_entry_with_a_period_has_no_phase_unless_given(tmp_path):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4}
    entries = {"layer_patterns": [{"period": 9}]}
    PiConfig(**sizes).save_pretrained(tmp_path)
    made, loaded = PiConfig(**sizes, **entries), PiConfig.from_pretrained(tmp_path, **entries)
    assert made.patterns() == loaded.patterns() == [PiPattern(32, 9, 112)]
    assert PiConfig.from_pretrained(tmp_path, period=9).pattern == PiPattern(32, 9, 112)
    assert PiConfig.from_pretrained(tmp_path, period=9, phase=[1, 2, 3, 4]).pattern.phases == (1, 2, 3, 4)
    assert PiConfig.from_pretrained(tmp_path, window=8).pattern == coordinated_heads(8, 112, 4)
    assert stacked([{"period": 2}], PiPattern(4, 3, 2, phase=(0, 2)), 1) == [PiPattern(4, 2, 2)]


def test_an_entry_that_brings_skips_to_a_model_without_has_coordinated_heads(tmp_path):
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "window": 4, "skips": 0}
    entries = ["local", {"skips": None}, {"skips": 8, "period": 3}, {"window": 9}]
    config = PiConfig(**sizes, layer_patterns=entries)
    config.save_pretrained(tmp_path)
    expected = [PiPattern(4, 1, 0), coordinated_heads(4, None, 4), PiPattern(4, 3, 8), PiPattern(9, 1, 0)]
    assert config.patterns() == PiConfig.from_pretrained(tmp_path).patterns() == expected
    assert PiConfig(**sizes, period=1, layer_patterns=[{"skips": 3}]).patterns()[0] == PiPattern(4, 1, 3)
    PiConfig(**sizes).save_pretrained(tmp_path / "window")
    for changes in ({"layer_patterns": [{"skips": None}]}, {"skips": 8}, {"skips": 8, "layer_patterns": ["all-skips"]}):
        loaded, made = PiConfig.from_pretrained(tmp_path / "window", **changes), PiConfig(**sizes | changes)
        assert loaded.patterns() == made.patterns() and loaded.patterns()[0].period == 4
    assert PiConfig.from_pretrained(tmp_path / "window", sinks=1).patterns()[0] == PiPattern(4, 1, 0, sinks=1)
