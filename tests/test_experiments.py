"""The experiments are fair, resumable, and measure what they say."""

import gzip
import json
import math
import random
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments import (
    corpora,
    data,
    image_text,
    language_modelling,
    listops,
    lra,
    recall,
    retrieval_qa,
    runner,
    series,
    span_finders,
)
from experiments.intervals import interval
from experiments.registry import EXPERIMENTS
from experiments.variants import BASELINE, MAIN, RANDOM_BLOCKS, SIDE, VARIANTS, config, random_blocks, specialise
from pi_attention.models import PiForCausalLM

SIZES = {"hidden": 64, "layers": 2, "heads": 4, "window": 16, "period": 16, "skips": 8, "context": 256}


def test_variants_have_the_same_parameters_and_keys():
    counts = {}
    for variant in VARIANTS:
        made = config({"variant": variant, **SIZES}, vocab_size=50)
        counts[variant] = sum(p.numel() for p in PiForCausalLM(made).parameters())
        pattern = made.patterns()[0]
        keys = pattern.window + (pattern.skips or 0) + pattern.sinks
        if variant not in ("dense", "ring-local, same window"):
            assert keys == SIZES["window"] + SIZES["skips"], variant
    assert max(counts.values()) - min(counts.values()) < 0.02 * min(counts.values()), counts
    with pytest.raises(ValueError, match="variant='other' is unknown"):
        config({"variant": "other", **SIZES})


def test_sinks_take_the_place_of_skips_or_of_the_window():
    settings = {**SIZES, "sinks": 6}
    for variant, window, skips in (
        ("window + sinks", 18, 0),
        ("pi + sinks", 16, 2),
        ("pi, coprime heads + sinks", 16, 2),
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


def toy(measure):
    return runner.Experiment("toy", "", "", "lower", lambda scale: [{"a": 1}, {"a": 2}], measure, (0.1, 0.2))


def test_a_run_tunes_the_rate_skips_finished_rows_and_survives_an_error(tmp_path):
    asked = []

    def measure(settings, folder):
        asked.append((settings["a"], settings["rate"], settings["seed"]))
        if settings["seed"] == 2 and asked.count(asked[-1]) == 1:
            raise RuntimeError("cut off")
        return {"validation": abs(settings["rate"] - settings["a"] / 10), "test": settings["seed"] / 10}

    with pytest.raises(RuntimeError):
        runner.run(toy(measure), "smoke", tmp_path, folder=tmp_path)
    assert len(runner.load("toy", tmp_path)) == 6
    with pytest.raises(RuntimeError):
        runner.run(toy(measure), "smoke", tmp_path, folder=tmp_path)
    done = runner.run(toy(measure), "smoke", tmp_path, folder=tmp_path)
    assert asked[:6] == [(1, 0.1, 0), (1, 0.2, 0), (2, 0.1, 0), (2, 0.2, 0), (1, 0.1, 1), (2, 0.2, 1)]
    assert len(done) == 8 and len(asked) == 10
    with pytest.raises(ValueError, match="leaves no cell"):
        runner.run(toy(measure), "smoke", tmp_path, folder=tmp_path, only="nothing")


def test_a_rate_that_diverges_is_not_the_best():
    rows = [{"settings": {"rate": r, "seed": 0}, "result": {"validation": v}} for r, v in ((1, math.nan), (2, 7.0))]
    assert runner.best_rate(toy(None), {}, rows) == 2


def test_interval_is_student_s():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5)
    assert math.isnan(interval([1.0])[1])


def test_recall_sequences_ask_for_what_was_shown():
    ids, labels = recall.sequences(32, 64, 5, 3, torch.Generator().manual_seed(0))
    assert int((labels != recall.IGNORE).sum()) == 32 * 15
    lags = set()
    for row, position in (labels != recall.IGNORE).nonzero().tolist():
        key, value = ids[row, position - 1], labels[row, position] - recall.KEYS
        shown = (ids[row] == recall.PAIR + key * recall.VALUES + value).nonzero()
        assert key < recall.KEYS and shown.numel() == 1 and shown < position - 1
        lags.add(position - 1 - int(shown))
    assert {lag % 2 for lag in lags} == {0, 1} and len(lags) > 40
    for lag in (1, 2, 17, 61):
        ids, values = recall.at_lag(8, 64, lag, 5, torch.Generator().manual_seed(0))
        assert torch.equal(ids[:, -1 - lag], recall.PAIR + ids[:, -1] * recall.VALUES + values - recall.KEYS)
        is_pair = (ids >= recall.PAIR) & (ids < recall.REST)
        assert (is_pair.sum(1) == 5).all() and ((ids < recall.PAIR).sum(1) == 1).all()
        assert all(len(set(((row[row >= recall.PAIR] - recall.PAIR) // recall.VALUES).tolist())) >= 5 for row in ids)


def value_of(tokens):
    """An independent reading of ListOps tokens: a stack."""
    stack = []
    for token in tokens:
        if token == listops.END:
            arguments = []
            while not isinstance(stack[-1], str):
                arguments.append(stack.pop())
            name = stack.pop()
            ordered = sorted(arguments)
            middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2
            choice = {"2": ordered[0], "3": ordered[-1], "4": middle, "5": sum(ordered) % 10}
            stack.append(choice[name])
        elif token >= listops.DIGIT:
            stack.append(int(token) - listops.DIGIT)
        else:
            stack.append(str(token))
    (result,) = stack
    return result


def test_listops_follows_the_recipe():
    ids, classes = listops.examples(60, seed=1)
    lengths = (ids != listops.PAD).sum(1)
    assert lengths.min() > 500 and lengths.max() < 2000
    assert [value_of(row[row != listops.PAD]) for row in ids] == classes.tolist()
    counts = Counter(ids[ids != listops.PAD].tolist())
    digits = sum(counts[listops.DIGIT + d] for d in range(10))
    operators = [counts[operator] for operator in listops.OPERATORS]
    assert sum(operators) == counts[listops.END]
    assert max(operators) < 1.2 * min(operators)
    assert 0.6 < digits / (digits + sum(operators)) < 0.9  # nearly every leaf is a digit, an operator has 6 arguments
    again = listops.examples(60, seed=1)
    assert np.array_equal(again[0], ids)


def test_a_corpus_is_written_from_folders(tmp_path):
    folder = tmp_path / "source"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "two.c").write_text("int two;")
    (folder / "a.c").write_text("int one;")
    zipped(folder / "c.h.gz", "int three;")
    (folder / "short.c").write_text(";")
    (folder / "other.txt").write_text("no source at all")
    made = corpora.Corpus(tmp_path / "new" / "linux.parquet", (folder,), suffixes=(".c", ".h"), least=3)
    assert made.write() == ["int one;", "int two;", "int three;"] == data.corpus("linux", tmp_path / "new")
    assert replace(made, every=2).write() == ["int one;", "int three;"]
    with pytest.raises(ValueError, match="hold no file"):
        replace(made, suffixes=(".py",)).write()
    with pytest.raises(FileNotFoundError, match="is no folder"):
        replace(made, folders=(tmp_path / "none",)).write()


def test_classes_of_tokens():
    found = {text: language_modelling.class_of(text) for text in (" the", "ing", "7th", " (", "\n", "  ", "Ah")}
    assert found == {
        " the": "start of a word", "ing": "inside a word", "7th": "digits", " (": "punctuation", "\n": "white space",
        "  ": "white space", "Ah": "inside a word",
    }  # fmt: skip


def test_squad_s_scores():
    assert retrieval_qa.normalised("The  Cat, sat!") == "cat sat"
    assert retrieval_qa.exact_match("the cat", ["a dog", "Cat."]) == 1.0
    assert retrieval_qa.f1("black cat sat", ["the black cat", "dog"]) == pytest.approx(2 * 2 / 5)
    assert retrieval_qa.f1("", ["x"]) == 0.0


@pytest.fixture(scope="module")
def words():
    """A tokenizer of the words w0 … w49, with `?`."""
    vocabulary = {"<end>": 0, "?": 1} | {f"w{i}": 2 + i for i in range(50)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def article(seed, tokens):
    draw = np.random.default_rng(seed)
    text = " ".join(f"w{i}" for i in draw.integers(0, 50, tokens)) + "\n"
    starts = [0, text.index(" ", len(text) // 2) + 1, text.rindex(" ") + 1]
    answers = [[{"start": start, "text": text[start:].split()[0]}] for start in starts]
    return {"text": text, "questions": [{"question": f"w{seed} ?", "answers": found} for found in answers]}


def test_windows_of_a_long_text_hold_the_answer_at_any_place(words):
    articles = [article(seed, 60 + seed) for seed in range(4)]
    whole = data.joined(articles)
    wanted = [question["answers"][0]["text"] for made in articles for question in made["questions"]]
    for question in whole["questions"]:
        start, text = question["answers"][0]["start"], question["answers"][0]["text"]
        assert whole["text"][start : start + len(text)] == text
    texts, draw = retrieval_qa.Texts([whole], words, context=40), random.Random(0)
    for question, text in zip(texts.questions, wanted, strict=True):
        starts = {texts.around(question, draw) for _ in range(400)}
        first, length, room = question["span"][0], len(texts.ids[0]), texts.room(question)
        assert starts == set(range(max(0, first + 1 - room), min(first, length - room) + 1))
        chosen = [min(starts), max(starts)]
        batch = retrieval_qa.batch_of(texts, [question] * 2, chosen)
        places = batch["start_positions"]
        assert torch.equal(places, batch["end_positions"]) and (batch["segment_ids"] == 0).all()
        assert [words.decode([int(row[at])]) for row, at in zip(batch["input_ids"], places, strict=True)] == [text] * 2


def test_a_pretrained_decoder_marks_spans_and_sees_no_padding(words, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=52, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path / "tiny")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "tiny")
    texts = retrieval_qa.Texts([article(0, 30)], words, context=64)
    batch = retrieval_qa.batch_of(texts, texts.questions[1:2], [0])
    padded = batch["segment_ids"] < 0
    other = batch | {"input_ids": batch["input_ids"].masked_fill(padded, 7)}
    for variant in span_finders.CONVERTIBLE:
        settings = {"variant": variant, "pretrained": "tiny", "window": 8, "period": 8, "skips": 4, "context": 64}
        model, tokenizer = span_finders.from_pretrained(settings, tmp_path)
        assert tokenizer.encode("w3 ?").ids == [5, 1]
        out, same = model(**batch), model(**other)
        assert torch.equal(out.start_logits[~padded], same.start_logits[~padded]) and torch.equal(out.loss, same.loss)
        assert out.end_logits[padded].isinf().all() and out.loss.isfinite()
        guess = retrieval_qa.answers(model, texts, texts.questions[1:2])[0]
        assert guess in texts.texts[0] and len(guess.split()) <= retrieval_qa.ANSWER
    with pytest.raises(ValueError, match="variant='dilated' of a pretrained model is unknown"):
        span_finders.pattern_of({**settings, "variant": "dilated"}, 4)


def test_recall_at_k():
    scores = torch.tensor([[3.0, 1, 0], [5, 4, 1], [2, 3, 1]])
    assert image_text.recalls(scores, (1, 2, 3)) == pytest.approx({"R@1": 1 / 3, "R@2": 2 / 3, "R@3": 1.0})
    for nothing in (torch.zeros(3, 3), torch.full((3, 3), torch.nan)):
        assert image_text.recalls(nothing, (1, 2)) == {"R@1": 0.0, "R@2": 0.0}


def test_drawings_of_a_theme_stay_in_one_part():
    parts = image_text.split([f"theme{i % 40}_drawing_{i}" for i in range(400)])
    assert sum(map(len, parts.values())) == 400
    themes = {part: {int(row) % 40 for row in rows} for part, rows in parts.items()}
    assert not themes["training"] & themes["test"] and not themes["validation"] & themes["test"]


def test_karpathy_s_splits(tmp_path):
    entries = [
        {"filename": f"{i}.jpg", "filepath": "val2014", "split": part, "sentences": [{"raw": f"caption {i}"}]}
        for i, part in enumerate(("train", "restval", "val", "test"))
    ]
    listing = tmp_path / "dataset_coco.json"
    listing.write_text(json.dumps({"images": entries}))
    found = data.karpathy(listing, tmp_path / "images", "train")
    assert found[0] == (tmp_path / "images" / "val2014" / "0.jpg", ["caption 0"]) and len(found) == 2
    assert len(data.karpathy(listing, tmp_path, "test")) == 1
    with pytest.raises(FileNotFoundError, match="Karpathy"):
        data.karpathy(tmp_path / "nothing.json", tmp_path, "test")


def test_missing_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"linux\.parquet"):
        data.corpus("linux", tmp_path)


def test_reviews_and_images_are_read(made_up):
    ids, positive = lra.reviews(made_up, 12)
    assert ids.shape == (40, 12) and positive.tolist() == [0, 1] * 20
    assert bytes((ids[7] - 1).astype(np.uint8).tolist()) == b"review numbe"
    pixels, classes = lra.images(made_up, "train")
    assert pixels.shape == (30, 784) and len(classes) == 30 and pixels.min() >= 1
    settings = {"task": "text", "context": 8, "examples": 30, "held out": 5}
    arrays = lra.dataset(settings, made_up)
    assert [len(arrays[f"{part} ids"]) for part in ("training", "validation", "test")] == [30, 5, 5]
    assert len(np.unique(np.concatenate([arrays["training ids"], arrays["test ids"]]), axis=0)) <= 35
    with pytest.raises(ValueError, match="more than the 40"):
        lra.dataset(settings | {"examples": 36}, made_up)


def test_emoji_have_labels_on_white(made_up):
    pixels, captions, names = data.emoji(made_up)
    assert pixels.shape == (120, 64, 64, 3) and captions[3] == captions[63] == "face 3, round"
    assert names[3] == "1F603_google" and names[63] == "1F603_twitter"


def zipped(path, text):
    with gzip.open(path, "wt") as file:
        file.write(text)


@pytest.fixture
def made_up(tmp_path):
    """A folder with data of the real formats and tiny contents."""
    draw = np.random.default_rng(0)
    folder = tmp_path / "data"
    for name in ("squad", "openclipart", "series", "emoji/google/64", "emoji/twitter/64", "fashion-mnist"):
        (folder / name).mkdir(parents=True)
    text = "The river runs past the old mill. " * 40
    asked = {"question": "What does the river pass?", "answers": [{"answer_start": 24, "text": "old mill"}]}
    article = {"paragraphs": [{"context": text, "qas": [asked] * 4}]}
    for name in (*retrieval_qa.TRAINING, retrieval_qa.TEST):
        zipped(folder / "squad" / f"{name}.json.gz", json.dumps({"data": [article, article]}))
    pixels = draw.integers(0, 256, (120, 64, 64, 3), dtype=np.uint8)
    np.savez(folder / "openclipart" / "openclipart64.npz", x=pixels)
    pairs = [{"row": i, "caption": f"a thing {i}", "id": f"things/theme{i % 30}_{i}"} for i in range(120)]
    (folder / "openclipart" / "openclipart_pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    emoji = [{"hexcode": f"1F{600 + i}", "label": f"face {i}", "tags": ["round"]} for i in range(60)]
    (folder / "emoji" / "compact.json").write_text(json.dumps(emoji))
    for vendor in ("google", "twitter"):
        for entry, image in zip(emoji, pixels, strict=False):
            Image.fromarray(image).save(folder / "emoji" / vendor / "64" / f"{entry['hexcode'].lower()}-fe0f.png")
    for part, count in (("train", 30), ("t10k", 10)):
        for name, header, shape in (("images-idx3", 16, (count, 784)), ("labels-idx1", 8, (count,))):
            values = bytes(header) + draw.integers(0, 10, shape, dtype=np.uint8).tobytes()
            (folder / "fashion-mnist" / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(values))
    lines = [f"review number {i},{i % 2},imdb" for i in range(40)]
    (folder / "reviews.csv").write_text("\n".join(["text,label,source", *lines, lines[0], "other,1,elsewhere"]))
    (folder / "wikitext-103").mkdir()
    (folder / "wikitext-103" / "wiki.test.tokens").write_text("once upon a time " * 200)
    days = [datetime(2000, 1, 1) + timedelta(days=i) for i in range(6000)]
    prices = 100 * np.exp(np.cumsum(draw.normal(0, 0.01, 6000)))
    for name, column, form in (("sp500", "Adj Close", "%m/%d/%Y"), ("wti", "DCOILWTICO", "%m/%d/%Y")):
        lines = [f"{day.strftime(form)},{price:.2f}" for day, price in zip(days, prices, strict=True)]
        zipped(folder / "series" / f"{name}.csv.gz", "\n".join([f"Date,{column}", *lines]))
    lines = [f"20,{day.isoformat(' ')},{price:.0f}" for day, price in zip(days, prices, strict=True)]
    zipped(folder / "series" / "CGM.csv.gz", "\n".join(["isig,datetime,glucose", *lines]))
    columns = {"date": days, "delay": draw.integers(-9, 99, 6000), "distance": draw.integers(99, 999, 6000)}
    columns |= {"origin": ["ATL"] * 6000, "destination": ["PHL"] * 6000}
    parquet.write_table(pyarrow.table(columns), folder / "series" / "flights-3m.parquet")
    for task in series.CLASSIFICATIONS:
        for part in ("TRAIN", "TEST"):
            rows = [",".join(f"{x:.3f}" for x in draw.normal(size=60 + i)) + f":{i % 3}" for i in range(12)]
            (folder / "series" / f"{task}_{part}.ts").write_text("\n".join(["@data", *rows]))
    return folder


def first_cells(experiment, count):
    """The experiment with the smoke cells of some variants only."""
    cells = [cell for cell in experiment.cells("smoke") if cell["variant"] in MAIN]
    groups = {cell.get("task", cell.get("images")): cell for cell in cells if cell["variant"] == "pi"}
    chosen = list(groups.values()) if count == 1 else cells
    return replace(experiment, cells=lambda scale: chosen, rates=experiment.rates[:1])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_runs_at_toy_size(name, made_up, tmp_path):
    rows = runner.run(first_cells(EXPERIMENTS[name], 1), "smoke", made_up, folder=tmp_path, seeds=1)
    for row in rows:
        assert math.isfinite(row["result"]["test"]) and row["result"]["parameters"] > 0
        assert row["settings"]["variant"] == "pi"
    again = EXPERIMENTS[name].measure(rows[0]["settings"], made_up)
    if name != "cost":  # which measures time
        assert again["test"] == rows[0]["result"]["test"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_variant_runs_in_processes(name, made_up, tmp_path, request):
    if not request.config.getoption("--smoke"):
        pytest.skip("make experiments-smoke runs it")
    experiment = replace(EXPERIMENTS[name], rates=EXPERIMENTS[name].rates[:1])
    rows = runner.run(experiment, "smoke", made_up, folder=tmp_path, workers=2, seeds=1)
    assert len(rows) == len(experiment.cells("smoke"))
    assert BASELINE in {row["settings"]["variant"] for row in rows} or name == "period_sweep"
    assert Path(tmp_path / f"{name}.json").exists()
