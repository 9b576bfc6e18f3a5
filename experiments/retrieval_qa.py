"""RetrievalQA: find the answer's span in a whole article. Trained on SQuADShifts, tested on SQuAD's articles.

The question stands before the text, so that a causal model reads the text with it in mind. The texts of training are
windows of the context's length, anywhere in all that a file of SQuADShifts holds.
"""

from __future__ import annotations

import random
import re
import statistics
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from experiments.data import joined, squad
from experiments.experiment import Experiment, Result, Scale, Settings
from experiments.span_finders import from_language_model, from_pretrained
from experiments.texts import documents
from experiments.training import DEVICE, fit, products, segments
from experiments.variants import MAIN, WITH_SINKS

TRAINING = ("new_wiki_v1.0", "nyt_v1.0", "reddit_v1.0")
TEST = "squaddev_v1.1"
QUESTION, ANSWER = 64, 32  # most tokens
SEPARATOR = 0


def normalised(answer: str) -> str:
    """As SQuAD's evaluation: lower case, no punctuation, no articles, single spaces (arXiv 1606.05250)."""
    kept = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(guess: str, answers: list[str]) -> float:
    """One if the guess is one of the answers, normalised."""
    return float(any(normalised(guess) == normalised(answer) for answer in answers))


def f1(guess: str, answers: list[str]) -> float:
    """The best F1 of the bag of words over the answers."""

    def one(answer: str) -> float:
        got, wanted = normalised(guess).split(), normalised(answer).split()
        if not got or not wanted:
            return float(got == wanted)
        common = sum((Counter(got) & Counter(wanted)).values())
        return 2 * common / (len(got) + len(wanted))

    return max(map(one, answers))


class Texts:
    """Texts in tokens with their questions; a question's tokens stand before its text, after them a separator.

    Args:
        articles: from `data.squad`.
        tokenizer: with offsets.
        context: most tokens of question and text together.
    """

    def __init__(self, articles: list[dict[str, Any]], tokenizer: Tokenizer, context: int) -> None:
        self.context = context
        self.texts = [article["text"] for article in articles]
        self.encoded = tokenizer.encode_batch(self.texts, add_special_tokens=False)
        self.ids = [encoded.ids for encoded in self.encoded]  # each `.ids` makes a new list
        self.questions = []
        for place, article in enumerate(articles):
            asked = [entry["question"] for entry in article["questions"]]
            for entry, encoded in zip(article["questions"], tokenizer.encode_batch(asked), strict=True):
                span = self._span(place, entry["answers"][0])
                self.questions.append({"text": place, "ids": encoded.ids[:QUESTION], "span": span, **entry})

    def _span(self, place: int, answer: dict[str, Any]) -> tuple[int, int] | None:
        first, end = answer["start"], answer["start"] + len(answer["text"]) - 1
        tokens = self.encoded[place].char_to_token(first), self.encoded[place].char_to_token(end)
        return None if None in tokens else tokens  # type: ignore[return-value]

    def room(self, question: dict[str, Any]) -> int:
        """Tokens of the text that fit behind a question."""
        return self.context - len(question["ids"]) - 1

    def around(self, question: dict[str, Any], draw: random.Random) -> int:
        """Where a window of the text may start, so that it holds the answer; every place is as likely."""
        first, last = question["span"]
        room = self.room(question)
        latest = min(first, max(0, len(self.ids[question["text"]]) - room))
        return draw.randint(max(0, last + 1 - room), latest)

    def text(self, question: dict[str, Any], first: int, last: int) -> str:
        """What stands from one token of the text to another."""
        offsets = self.encoded[question["text"]].offsets
        return self.texts[question["text"]][offsets[first][0] : offsets[last][1]].strip()


def batch_of(texts: Texts, questions: list[dict[str, Any]], starts: list[int]) -> dict[str, Tensor]:
    """Inputs [B, context] of questions and of their texts from `starts` on, padded on the right, and the labels."""
    ids = torch.zeros(len(questions), texts.context, dtype=torch.long)
    present = torch.zeros_like(ids, dtype=torch.bool)
    spans = torch.zeros(len(questions), 2, dtype=torch.long)
    for row, (question, start) in enumerate(zip(questions, starts, strict=True)):
        shown = texts.ids[question["text"]][start : start + texts.room(question)]
        tokens = torch.tensor([*question["ids"], SEPARATOR, *shown])
        ids[row, : len(tokens)] = tokens
        present[row, : len(tokens)] = True
        if question["span"] is not None:
            spans[row] = torch.tensor(question["span"]) - start + len(question["ids"]) + 1
    first, last = spans.unbind(dim=1)
    return {"input_ids": ids, "segment_ids": segments(present), "start_positions": first, "end_positions": last}


@torch.no_grad()
def answers(model: nn.Module, texts: Texts, questions: list[dict[str, Any]]) -> list[str]:
    """The most likely span of at most ANSWER tokens for each question, in its text from the beginning."""
    batch = batch_of(texts, questions, [0] * len(questions))
    with products():
        out = model(input_ids=batch["input_ids"].to(DEVICE), segment_ids=batch["segment_ids"].to(DEVICE))
    found = []
    for row, question in enumerate(questions):
        begin, end = len(question["ids"]) + 1, int((batch["segment_ids"][row] >= 0).sum())
        first, last = (logits[row, begin:end].float() for logits in (out.start_logits, out.end_logits))
        width = min(ANSWER, len(last))
        padded = torch.cat([last, last.new_full((width - 1,), float("-inf"))])
        start, more = divmod(int((first[:, None] + padded.unfold(0, width, 1)).argmax()), width)
        found.append(texts.text(question, start, start + more))
    return found


def measure(settings: Settings, data: Path) -> Result:
    """Train a span finder of one variant; EM and F1 in percent on whole articles of SQuAD."""
    torch.manual_seed(settings["seed"])
    draw = random.Random(settings["seed"])
    model, tokenizer = (from_pretrained if "pretrained" in settings else from_language_model)(settings, data)
    files = [squad(data / "squad" / f"{name}.json.gz")[: settings["articles"]] for name in TRAINING]
    training = Texts([joined(articles) for articles in files], tokenizer, settings["context"])
    asked = [q for q in training.questions if q["span"] and q["span"][1] - q["span"][0] < ANSWER]
    test = Texts(squad(data / "squad" / f"{TEST}.json.gz")[: settings["articles"]], tokenizer, settings["context"])

    def batches() -> Iterator[dict[str, Tensor]]:
        while True:
            chosen = draw.sample(asked, settings["batch"])
            yield batch_of(training, chosen, [training.around(question, draw) for question in chosen])

    last = fit(model, batches(), steps=settings["steps"], rate=settings["rate"])
    chosen = random.Random(0).sample(test.questions, min(2 * settings["held out"], len(test.questions)))
    rows = [chosen[start : start + settings["batch"]] for start in range(0, len(chosen), settings["batch"])]
    guesses = [guess for questions in rows for guess in answers(model, test, questions)]
    wanted = [[answer["text"] for answer in question["answers"]] for question in chosen]
    half = len(chosen) // 2

    def score(metric: Any, part: slice) -> float:
        return 100 * statistics.fmean(map(metric, guesses[part], wanted[part]))

    visible = [q["span"] is not None and q["span"][1] < test.room(q) for q in chosen[half:]]
    return {
        "validation": score(f1, slice(half)),
        "test": score(f1, slice(half, None)),
        "exact match": score(exact_match, slice(half, None)),
        "F1 by question": [round(f1(*pair), 3) for pair in zip(guesses[half:], wanted[half:], strict=True)],
        "answers within the context": sum(visible) / len(visible),
        "training loss": last,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def prepare(settings: Settings, data: Path) -> None:
    """Train the tokenizer and encode the corpus of a language model that is trained here."""
    if "corpus" in settings:
        documents(settings["corpus"], settings["vocabulary"], data)


def cells(scale: Scale) -> list[Settings]:
    """The main variants of a pretrained model, in whose context two thirds of SQuAD's articles are whole.

    Again with sinks for the longest question, which every token of the text sees then.
    """
    if scale == "laptop":
        return []
    sizes: Settings = {"pretrained": "smollm2", "context": 8192, "batch": 4, "steps": 600, "articles": 100_000,
                       "held out": 500, "window": 128, "period": 64, "skips": 128}  # fmt: skip
    if scale == "smoke":
        sizes = {"corpus": "shakespeare", "vocabulary": 512, "pretraining": 1, "hidden": 16, "layers": 1, "heads": 2,
                 "context": 512, "batch": 2, "steps": 2, "articles": 3, "held out": 2, "window": 16, "period": 16,
                 "skips": 4}  # fmt: skip
        return [{"variant": variant, **sizes} for variant in MAIN]
    return [{"variant": variant, **sizes} for variant in MAIN] + [
        {"variant": variant, **sizes, "sinks": QUESTION} for variant in WITH_SINKS
    ]


EXPERIMENT = Experiment(
    name="retrieval_qa",
    title="RetrievalQA",
    metric="F1 in percent",
    better="higher",
    cells=cells,
    measure=measure,
    rates=(2e-4,),
    prepare=prepare,
)
