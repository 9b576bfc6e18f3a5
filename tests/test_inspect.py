"""What `pi-attention inspect` says of a pattern, in its tables."""

import io

import pytest
from rich.console import Console

from pi_attention import PiPattern
from pi_attention.cli.inspect import Inspect, _of_the_stack
from pi_attention.heads import coordinated_heads
from pi_attention.models import PiConfig
from pi_attention.receptive_field import receptive_field


def printed(pattern, *, context=2048, heads=4, kv_heads=4):
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(Inspect._table(pattern, "layers 0", context, heads, kv_heads, 64))
    rows = [line.strip("│ ").split("│") for line in console.export_text().splitlines() if line.startswith("│")]
    return {name.strip(): words.strip() for name, words in rows}


def test_coordinated_heads_in_words():
    rows = printed(coordinated_heads(16, 64, 4))
    assert rows["a query sees"] == (
        "the last 16 tokens, 64 keys at multiples of 4 plus 0, 1, 2, 3 (one phase a head) beyond them"
    )
    assert rows["heads together see"] == "every lag below 272 in one layer; no holes up to 271"
    assert rows["keys a lag"] == (
        "1 at 0 to 15, 0.25 at 16 to 31, 0.25 at 32 to 63, 0.25 at 64 to 127, 0.25 at 128 to 255, "
        "0.0156 at 256 to 511, none beyond (mean of heads)"
    )
    assert rows["a decoded token reads"].startswith("80 keys a key head, 3.91%")
    assert "all skips, beside dense" not in rows


def test_a_dense_layer_of_a_hybrid_in_words():
    dense = PiConfig(window=80, layer_patterns=["local", "dense"]).patterns()[1]
    rows = printed(dense)
    assert rows["a query sees"] == "every token up to itself"
    assert rows["reach of a layer"] == "everything before"
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(_of_the_stack(receptive_field([dense, *[PiPattern(8, 1, 0)] * 2], 64), alike=False))
    assert "the last 3 layers" in console.export_text()


def test_without_a_period_heads_are_coordinated_as_in_a_new_model():
    described, *_ = Inspect(heads=6)._describe()
    assert described == PiConfig(num_attention_heads=6, hidden_size=96).patterns()[:1]
    assert Inspect(period=(64,))._describe()[0] == [PiPattern(32, 64, 112)]


def test_a_single_period_has_its_holes_told():
    rows = printed(PiPattern(64, 64, 16))
    assert rows["heads together see"] == (
        "every lag below 65 in one layer; 15 holes up to 1,024, the first at lags 65 to 127"
    )


def test_a_layer_of_all_skips_has_its_price_beside_dense():
    pattern = coordinated_heads(16, None, 4)
    rows = printed(pattern, context=32768)
    assert rows["all skips, beside dense"].startswith("25.1% of the products")
    assert rows["a decoded token reads"].startswith("8,204 keys a key head, 25.04%")  # 16 + 32,752 / 4
    grouped = printed(pattern, context=32768, kv_heads=1)
    assert grouped["a decoded token reads"].startswith("32,768 keys a key head, 100.00%")


def test_means_are_those_of_all_heads():
    one, other = (printed(PiPattern(4, period, 8), context=64, heads=2, kv_heads=2) for period in (4, 16))
    both = printed(PiPattern(4, (4, 16), 8), context=64, heads=2, kv_heads=2)
    skips = [float(rows["keys per query"].split("local and ")[1].split(" skip")[0]) for rows in (one, other, both)]
    assert skips[0] != skips[1] and abs(skips[2] - (skips[0] + skips[1]) / 2) < 0.1


def test_the_page_shows_layers_of_several_kinds(tmp_path):
    console = Console(record=True, width=300, file=io.StringIO())
    Inspect(window=80, layer_patterns=("local", "dense"), context=256, html=True, out=tmp_path).execute(console)
    assert '"kinds": ["pi", "dense"]' in (tmp_path / "explorer.html").read_text()
    with pytest.raises(ValueError, match="html=True"):
        Inspect(causal=False, period=(64,), context=256, html=True, out=tmp_path).execute(console)
