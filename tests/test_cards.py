"""Model cards: what save_pretrained, train and convert write about a model is true of it."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pi_attention import PiPattern, coordinated_heads
from pi_attention.cli.main import parse
from pi_attention.cli.terminal import make_console
from pi_attention.convert import convert
from pi_attention.data.tokenizers import byte_tokenizer
from pi_attention.models import PiConfig, PiForCausalLM
from pi_attention.models.card import CARD, card_text, write_card
from pi_attention.training.card import write_run_card
from pi_attention.training.config import TrainConfig, load_yaml

RUN = Path(__file__).parent / "fixtures" / "run"
SIZES = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64))


def fields(text):
    return yaml.safe_load(text.split("---")[1])


@pytest.mark.parametrize("kind", ["made", "converted"])
def test_a_saved_model_has_a_card_with_its_pattern(tmp_path, kind):
    pattern = PiPattern(8, 7, 3, sinks=2)
    model = (
        PiForCausalLM(PiConfig(**SIZES, **pattern.to_dict()))
        if kind == "made"
        else convert(llama(), pattern, gate=True)
    )
    model.save_pretrained(tmp_path / "m")
    text = (tmp_path / "m" / CARD).read_text()
    assert "| 0, 1 | 8 | 7 | 0 | 3 | 2 | 13 | 28 tokens |" in text
    assert "########......+......+......+" in text  # lags 14, 21, 28
    assert fields(text)["library_name"] == "transformers" and "pi-attention" in fields(text)["tags"]
    block = text.split("```python\n")[1].split("```")[0].replace('"m"', repr(str(tmp_path / "m")))
    byte_tokenizer().save_pretrained(tmp_path / "m")
    names: dict[str, object] = {}
    exec(compile(block, "card", "exec"), names)
    assert type(names["model"]) is type(model)


def test_each_pattern_and_each_kind_of_head_has_its_line():
    made = coordinated_heads(window=4, skips=2, heads=4)
    text = card_text("m", PiConfig(**SIZES, **made.to_dict(), layer_patterns=["pi", "dense"]), {})
    assert "| 0 | 4 | 4 | 0, 1, 2, 3 |" in text and "| 1 | dense |" in text
    strips = [line for line in text.splitlines() if line.startswith("####")]
    assert strips == ["####+...+...", "####.+...+..", "####..+...+.", "####...+...+"]


def test_the_card_of_a_hybrid_says_what_its_layers_see():
    hybrid = card_text("m", PiConfig(**SIZES, window=4, layer_patterns=["local", "dense"]), {})
    assert "by layer, its queries attend to everything before them or to a window of neighbours." in hybrid
    assert "`#` window, `.` nothing" in hybrid and "keeps every token in the layers that see everything" in hybrid
    dense = card_text("m", PiConfig(**SIZES, window=4, layer_patterns=["dense"]), {})
    assert "its queries attend to everything before them." in dense
    assert "sparse-attention" not in dense and "Each line" not in dense
    sparse = card_text("m", PiConfig(**SIZES, window=4, skips=2), {})
    assert "a window of neighbours and periodic skips." in sparse and "a cache of bounded memory" in sparse


def test_a_strip_is_made_without_walking_its_lags():
    pattern = PiPattern(4, 2**40, 2)  # a walk would take days
    text = card_text("m", PiConfig(**SIZES, **pattern.to_dict()), {})
    assert f"#{'.' * 34}+{'.' * 35}+\n" in text


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / CARD).write_text("mine")
    PiForCausalLM(PiConfig(**SIZES)).save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "mine"


def test_text_of_a_stranger_breaks_no_table_and_no_field(tmp_path):
    write_card(tmp_path, PiConfig(**SIZES), {"data": "a|b\nc"}, base_model='x: "y"\n- z')
    text = (tmp_path / CARD).read_text()
    assert r"| data | a\|b c |" in text and fields(text)["base_model"] == 'x: "y"\n- z'


def test_the_card_of_a_run_tells_its_data_and_losses(tmp_path):
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    summary = json.loads((run / "summary.json").read_text())
    write_run_card(run / "model", model.config, load_yaml(TrainConfig, run / "train.yaml"), summary)
    text = (run / "model" / CARD).read_text()
    assert f"| validation loss | {summary['eval_loss']:.3f} nats a token |" in text and "| data | " in text
    assert "](pattern.png)" in text and (run / "model" / "pattern.png").stat().st_size > 5000


def test_convert_writes_what_the_conversion_cost(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    shape = ["--window", "8", "--period", "8", "--skips", "2", "--context", "64", "--eval-blocks", "1", "--layers", "1"]
    folders = ["--model", str(tmp_path / "dense"), "--out", str(tmp_path / "out")]
    assert parse(["convert", *folders, *shape]).execute(make_console()) == 0
    text = (tmp_path / "out" / CARD).read_text()
    assert "| perplexity, dense | " in text and ", untrained | " in text
    assert "](pattern.png)" in text and "base_model" not in fields(text)
    assert "| 0 | dense |" in text and "| 1 | 8 | 8 |" in text
    chosen = [*folders[:2], "--out", str(tmp_path / "chosen"), *shape[:-2], "--dense-layers", "1"]
    assert parse(["convert", *chosen]).execute(make_console()) == 0
    text = (tmp_path / "chosen" / CARD).read_text()
    kept = text.split("| dense layers | ")[1][0]
    assert f"| {kept} | dense |" in text and f"| {1 - int(kept)} | 8 | 8 |" in text
    with pytest.raises(ValueError, match="dense_layers=2 leaves none of 2 layers to convert"):
        parse(["convert", *chosen[:2], "--out", str(tmp_path / "x"), *chosen[4:-1], "2"]).execute(make_console())
    evaluate = ["eval", str(tmp_path / "out"), "--limit", "1"]  # at the model's own context
    assert parse([*evaluate, "--data", "shakespeare"]).execute(make_console()) == 0
    with pytest.raises(ValueError, match="data is needed"):
        parse(evaluate).execute(make_console())
