"""RetrievalQA: find the answer's span in a whole article. Trained on SQuADShifts, tested on SQuAD's articles.

Each model is first trained as a language model of the same variant, on documents of other kinds.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.data import bpe, documents, squad, windows
from experiments.runner import Experiment, Result, Scale, Settings
from experiments.training import DEVICE, fit, products, segments
from experiments.variants import MAIN, config, specialise
from pi_attention.models import PiForCausalLM, PiForQuestionAnswering

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


class Articles:
    """Articles in tokens, and their questions: the question's tokens stand before the article, after a separator.

    Args:
        articles: from `data.squad`.
        tokenizer: with offsets.
        context: tokens of question and article; what lies beyond is cut off, and its answers cannot be found.
    """

    def __init__(self, articles: list[dict[str, Any]], tokenizer: Any, context: int) -> None:
        self.context = context
        self.texts = [article["text"] for article in articles]
        self.encoded = tokenizer.encode_batch(self.texts)
        self.ids = [encoded.ids[:context] for encoded in self.encoded]  # each `.ids` makes a new list
        self.questions = [
            {"article": place, "ids": tokenizer.encode(entry["question"]).ids[:QUESTION], **entry}
            for place, article in enumerate(articles)
            for entry in article["questions"]
        ]

    def inputs(self, question: dict[str, Any]) -> list[int]:
        """Token ids of a question and its article."""
        room = self.context - len(question["ids"]) - 1
        return [*question["ids"], SEPARATOR, *self.ids[question["article"]][:room]]

    def span(self, question: dict[str, Any], length: int) -> tuple[int, int] | None:
        """First and last token of the first answer, if both are among `length` tokens."""
        answer, before = question["answers"][0], len(question["ids"]) + 1
        encoded = self.encoded[question["article"]]
        first = encoded.char_to_token(answer["start"])
        last = encoded.char_to_token(answer["start"] + len(answer["text"]) - 1)
        if first is None or last is None or before + last >= length:
            return None
        return before + first, before + last

    def text(self, question: dict[str, Any], first: int, last: int) -> str:
        """What stands from one token of the inputs to another."""
        before, offsets = len(question["ids"]) + 1, self.encoded[question["article"]].offsets
        return self.texts[question["article"]][offsets[first - before][0] : offsets[last - before][1]].strip()


def batch_of(articles: Articles, questions: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Inputs and labels of questions, padded on the right to the whole context."""
    rows = [torch.tensor(articles.inputs(question)) for question in questions]
    ids = torch.zeros(len(rows), articles.context, dtype=torch.long)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = row
    lengths = torch.tensor([len(row) for row in rows])
    spans = [articles.span(question, len(row)) for question, row in zip(questions, rows, strict=True)]
    assert all(span is not None for span in spans)
    first, last = torch.tensor(spans).unbind(dim=1)
    present = torch.arange(articles.context) < lengths[:, None]
    return {"input_ids": ids, "segment_ids": segments(present), "start_positions": first, "end_positions": last}


@torch.no_grad()
def answer(model: PiForQuestionAnswering, articles: Articles, question: dict[str, Any]) -> str:
    """The most likely span of at most ANSWER tokens."""
    ids = torch.tensor(articles.inputs(question))
    with products():
        out = model(ids[None].to(DEVICE))
    begin = len(question["ids"]) + 1
    start, end = out.start_logits[0, begin:].float(), out.end_logits[0, begin:].float()
    width = min(ANSWER, len(end))
    padded = torch.cat([end, end.new_full((width - 1,), float("-inf"))])
    first, more = divmod(int((start[:, None] + padded.unfold(0, width, 1)).argmax()), width)
    return articles.text(question, begin + first, begin + first + more)


def pretrain(model: PiForQuestionAnswering, settings: Settings, data: Path) -> float:
    """Give the model the weights of a causal language model of its variant; returns that one's training perplexity."""
    pretrained = config(settings, vocab_size=settings["vocabulary"])
    language_model = specialise(PiForCausalLM(pretrained).to(DEVICE), settings)
    parts = documents(settings["corpus"], settings["vocabulary"], data)
    generator = torch.Generator().manual_seed(1 + settings["seed"])
    drawn = windows(parts["training"], settings["context"], settings["batch"], generator)
    batches = ({"input_ids": ids, "labels": ids} for ids in drawn)
    last = fit(language_model, batches, steps=settings["pretraining"], rate=settings["rate"])
    model.base_model.load_state_dict(language_model.model.state_dict())
    return math.exp(last)


def measure(settings: Settings, data: Path) -> Result:
    """Train a span finder of one variant; EM and F1 in percent on whole articles of SQuAD."""
    torch.manual_seed(settings["seed"])
    draw = random.Random(settings["seed"])
    context = settings["context"]
    tokenizer = bpe(settings["corpus"], settings["vocabulary"], data)
    files = TRAINING[: settings["files"]]
    known = [a for name in files for a in squad(data / "squad" / f"{name}.json.gz")][: settings["articles"]]
    training = Articles(known, tokenizer, context)
    asked = [q for q in training.questions if training.span(q, len(training.inputs(q))) is not None]
    test = Articles(squad(data / "squad" / f"{TEST}.json.gz")[: settings["articles"]], tokenizer, context)
    made = config(settings, vocab_size=settings["vocabulary"], causal=False)
    model = specialise(PiForQuestionAnswering(made).to(DEVICE), settings)
    perplexity = pretrain(model, settings, data)

    def batches() -> Iterator[dict[str, Tensor]]:
        while True:
            yield batch_of(training, draw.sample(asked, settings["batch"]))

    last = fit(model, batches(), steps=settings["steps"], rate=settings["rate"])
    chosen = random.Random(0).sample(test.questions, min(2 * settings["held out"], len(test.questions)))

    def score(questions: list[dict[str, Any]]) -> tuple[float, float]:
        pairs = [(answer(model, test, q), [a["text"] for a in q["answers"]]) for q in questions]
        return tuple(100 * sum(s(*pair) for pair in pairs) / len(pairs) for s in (f1, exact_match))  # type: ignore[return-value]

    half = len(chosen) // 2
    validation, (test_f1, test_em) = score(chosen[:half]), score(chosen[half:])
    found = sum(test.span(q, len(test.inputs(q))) is not None for q in chosen[half:])
    return {
        "validation": validation[0],
        "test": test_f1,
        "exact match": test_em,
        "answers within the context": found / (len(chosen) - half),
        "pretraining perplexity": perplexity,
        "training loss": last,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def prepare(settings: Settings, data: Path) -> None:
    """Train the tokenizer and encode the corpus."""
    documents(settings["corpus"], settings["vocabulary"], data)


def cells(scale: Scale) -> list[Settings]:
    """The main variants on contexts of 16,384 tokens, which hold most of SQuAD's articles whole."""
    if scale == "laptop":
        return []
    sizes = {"corpus": "prose", "vocabulary": 8192, "files": 3, "articles": 100_000, "held out": 250}
    sizes |= {"hidden": 256, "layers": 6, "heads": 4, "context": 16384, "batch": 4, "pretraining": 1000, "steps": 1000}
    sizes |= {"window": 64, "period": 64, "skips": 64}
    if scale == "smoke":
        sizes |= {"corpus": "shakespeare", "vocabulary": 512, "files": 1, "articles": 3, "held out": 2}
        sizes |= {"hidden": 16, "layers": 1, "heads": 2, "context": 512, "batch": 2, "pretraining": 1, "steps": 2}
        sizes |= {"window": 16, "period": 16, "skips": 4}
    return [{"variant": variant, **sizes} for variant in MAIN]


EXPERIMENT = Experiment(
    name="retrieval_qa",
    title="RetrievalQA",
    metric="F1 in percent",
    better="higher",
    cells=cells,
    measure=measure,
    rates=(1e-3,),
    prepare=prepare,
)
