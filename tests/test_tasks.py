"""What the tasks of the experiments ask, read and score."""

import json
import random
from collections import Counter
from dataclasses import replace

import made_up_data
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments import (
    classification,
    corpora,
    data,
    image_text,
    language_losses,
    language_modelling,
    listops,
    lra,
    recall,
    retrieval_qa,
    runner,
    span_finders,
    texts,
)
from experiments.experiment import on_dataset
from pi_attention.models import PiConfig


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
    made_up_data.zipped(folder / "c.h.gz", "int three;")
    (folder / "short.c").write_text(";")
    (folder / "other.txt").write_text("no source at all")
    made = corpora.Corpus(tmp_path / "new" / "linux.parquet", (folder,), suffixes=(".c", ".h"), least=3)
    made.write()
    assert texts.corpus("linux", tmp_path / "new") == ["int one;", "int two;", "int three;"]
    replace(made, every=2).write()
    assert texts.corpus("linux", tmp_path / "new") == ["int one;", "int three;"]
    replace(made, out=tmp_path / "new" / "more.parquet", join=True, least=20).write()
    assert texts.corpus("linux+more", tmp_path / "new")[2:] == ["int one;\nint two;\nint three;"]
    with pytest.raises(ValueError, match="hold no file"):
        replace(made, suffixes=(".py",)).write()
    with pytest.raises(FileNotFoundError, match="is no folder"):
        replace(made, folders=(tmp_path / "none",)).write()


def test_tables_and_near_copies_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.corpora.GROUP", 1)
    code = [f"    {name} = {name} + {number};" for number, name in enumerate("abcdefghijklmnopqrstuvwxyz" * 20)]
    files = {
        "a.c": "\n".join(code),
        "b.c": "\n".join(["/* of another owner */", *code[:300], *code[310:]]),  # a near copy
        "c.c": "\n".join(code[:100] + [line.replace("+", "-") for line in code]),  # a sixth of it stood before
        "d.c": "\n".join(f"#define REGISTER_{number} {number}" for number in range(50)),
        "e.c": "\n".join([" * what the next line does", "call(it);"] * 40),
    }
    (tmp_path / "source").mkdir()
    for name, text in files.items():
        (tmp_path / "source" / name).write_text(text)
    made = corpora.Corpus(tmp_path / "made.parquet", (tmp_path / "source",), suffixes=(".c",))
    made.write()
    assert texts.corpus("made", tmp_path) == list(files.values())
    strict = replace(made, tables=False, alike=0.5)
    strict.write()
    assert texts.corpus("made", tmp_path) == [files["a.c"], files["c.c"], files["e.c"]]
    assert (strict.counts["tables"], strict.counts["alike"], strict.counts["documents"]) == (1, 1, 3)
    size = made.out.stat().st_size
    replace(strict, most=size - 1).write()
    assert texts.corpus("made", tmp_path) == [files["a.c"], files["c.c"]]  # the rest would not fit
    assert made.out.stat().st_size < size


def test_classes_of_tokens():
    found = {text: language_losses.class_of(text) for text in (" the", "ing", "7th", " (", "\n", "  ", "Ah")}
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
        texts.corpus("linux", tmp_path)


LINES = [
    "",
    " = First title = \n",
    "",
    " = = A section = = \n",
    " 1 = 1 , it says = \n",
    "",
    " = Second = \n",
    " more \n",
]


@pytest.fixture
def wikitext(monkeypatch):
    """WikiText on the hub, whose rows are lines: three articles a split, the first two as in `LINES`."""
    import datasets

    asked = []

    def load_dataset(repository, configuration, *, split):
        asked.append((repository, configuration, split))
        words = " ".join(f"word{i % 97}" for i in range(600))
        return datasets.Dataset.from_dict({"text": [*LINES, f" = {split} = \n", f" {words} \n"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts.bpe.cache_clear(), texts.documents.cache_clear(), language_losses.wikitext.cache_clear()
    return asked


def test_wikitext_of_the_hub_becomes_articles_again(wikitext, tmp_path):
    articles = texts.hub("Salesforce/wikitext", "test")
    assert [article.split("=")[1].strip() for article in articles[1:]] == ["First title", "Second", "test"]
    assert "".join(articles) == "".join(line.rstrip("\n") + "\n" for line in [*LINES, *articles[-1].splitlines()])
    assert texts.hub("other/name:part", "test")[1] == LINES[1]
    assert wikitext == [("Salesforce/wikitext", "wikitext-103-v1", "test"), ("other/name", "part", "test")]
    _, ratio = language_losses.wikitext("Salesforce/wikitext", 512, 64, tmp_path)
    words = len("".join(articles).split()) + len(LINES) + 2  # the end of a line counts
    ids = texts.bpe("Salesforce/wikitext", 512, tmp_path).encode("".join(articles)).ids
    assert ratio == pytest.approx(len(ids) / words)


def test_a_language_model_trains_on_the_splits_of_the_hub(wikitext, tmp_path):
    trained = on_dataset(language_modelling.EXPERIMENT, "Salesforce/wikitext")
    row, *_ = runner.run([trained], "smoke", tmp_path, folder=tmp_path, seeds=1, only='"pi"')["language_modelling"]
    assert row["settings"]["corpus"] == "Salesforce/wikitext" and row["result"]["test"] < 1000
    assert {split for _, _, split in wikitext} == {"train", "validation", "test"}
    assert (tmp_path / "prepared" / "Salesforce--wikitext-512-train.npz").exists()
    with pytest.raises(ValueError, match="take a shorter context"):
        language_modelling.prepare(row["settings"] | {"context": 16384}, tmp_path)
    with pytest.raises(ValueError, match="no corpus of text"):
        on_dataset(listops.EXPERIMENT, "Salesforce/wikitext")
    with pytest.raises(ValueError, match="OWNER/NAME"):
        on_dataset(language_modelling.EXPERIMENT, "wikitext")


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


def test_a_classifier_by_the_mean_reads_all_tokens_but_the_padding():
    made = PiConfig(vocab_size=9, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, window=4, causal=False)
    torch.manual_seed(0)
    by_mean, by_first = (classification.Classifier(made, 3, mean=mean).eval() for mean in (True, False))
    by_first.load_state_dict(by_mean.state_dict())
    ids, label = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([2])
    padded = torch.nn.functional.pad(ids, (0, 4), value=classification.PAD)
    logits = by_mean(ids, label).logits
    assert torch.allclose(logits, by_mean(padded, label).logits, atol=1e-6)
    first = torch.tensor([[made.vocab_size - 1]])
    hidden = by_mean.body(torch.cat([first, ids], dim=1)).last_hidden_state
    assert torch.allclose(logits, by_mean.head(hidden.mean(1)), atol=1e-6)
    assert torch.allclose(by_first(ids, label).logits, by_mean.head(hidden[:, 0]), atol=1e-6)


def test_emoji_have_labels_on_white(made_up):
    pixels, captions, names = data.emoji(made_up)
    assert pixels.shape == (120, 64, 64, 3) and captions[3] == captions[63] == "face 3, round"
    assert names[3] == "1F603_google" and names[63] == "1F603_twitter"
