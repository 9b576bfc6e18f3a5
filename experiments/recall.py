"""Recall at a distance: where do the holes of a pattern show? Multi-query associative recall with lags under control.

A token says a key and its value; later the key alone is asked for, and its value is to be predicted. Between them is
filler. The lag from the question to the pair is drawn freely in training; tests put one question at each lag. With
a single pair this is passkey retrieval.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from experiments.experiment import Experiment, Result, Scale, Settings
from experiments.questions import distinct
from experiments.training import DEVICE, fit_by_length, products
from experiments.variants import COORDINATED_HEADS, MAIN, ONE_DENSE, ONE_GLOBAL, PLANNED, VARIANTS, config, specialise
from pi_attention.models import PiForCausalLM
from pi_attention.receptive_field import receptive_field

KEYS, VALUES, FILLER = 16, 16, 8
PAIR = KEYS + VALUES  # the first of the tokens that say a key and a value
REST = PAIR + KEYS * VALUES  # the first filler
VOCABULARY = REST + FILLER
IGNORE = -100


def sequences(batch: int, context: int, pairs: int, asks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Input ids and labels [batch, context]: `pairs` keys with values, each asked for `asks` times at later places."""
    ids = REST + torch.randint(FILLER, (batch, context), generator=generator)
    labels = torch.full_like(ids, IGNORE)
    keys = distinct(batch, pairs, KEYS, generator)
    values = torch.randint(VALUES, (batch, pairs), generator=generator)
    places = distinct(batch, pairs * (1 + asks), context - 1, generator)
    slots = places.view(batch, pairs, 1 + asks).sort(dim=2).values
    ids.scatter_(1, slots[:, :, 0], PAIR + keys * VALUES + values)
    for slot in slots[:, :, 1:].unbind(dim=2):
        ids.scatter_(1, slot, keys)
        labels.scatter_(1, slot + 1, KEYS + values)  # the model shifts labels: predicted at the question
    return ids, labels


def at_lag(batch: int, context: int, lag: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Input ids [batch, context] that end in a question whose pair stands `lag` tokens before, and the labels to come.

    The other `pairs` − 1 pairs stand at random places.
    """
    ids = REST + torch.randint(FILLER, (batch, context), generator=generator)
    keys = distinct(batch, pairs, KEYS, generator)
    values = torch.randint(VALUES, (batch, pairs), generator=generator)
    shown = context - 1 - lag
    others = distinct(batch, pairs - 1, context - 2, generator)
    others += others >= shown
    slots = torch.cat([torch.full((batch, 1), shown), others], dim=1)
    ids.scatter_(1, slots, PAIR + keys * VALUES + values)
    ids[:, -1] = keys[:, 0]
    return ids, KEYS + values[:, 0]


def measure(settings: Settings, data: Path) -> Result:
    """Train a variant, then its accuracy at every lag of `lags`, and on sequences as in training.

    Where the settings have lengths "shorter first", each has its share of the steps, with as many tokens and questions
    a step and a schedule of its own, before the context has the last share.
    """
    torch.manual_seed(settings["seed"])
    generator = torch.Generator().manual_seed(1 + settings["seed"])
    context, pairs = settings["context"], settings["pairs"]
    made = config(settings, vocab_size=VOCABULARY)
    model = specialise(PiForCausalLM(made).to(DEVICE), settings)

    def batches(length: int) -> Iterator[dict[str, Tensor]]:
        batch = settings["batch"] * context // length
        asks = (1 + settings["asks"]) * length // context - 1
        while True:
            ids, labels = sequences(batch, length, pairs, asks, generator)
            yield {"input_ids": ids, "labels": labels}

    lengths = [*settings.get("shorter first", []), context]
    steps = dict.fromkeys(lengths, settings["steps"] // len(lengths))
    last, _ = fit_by_length(model, batches, steps, rate=settings["rate"])

    @torch.no_grad()
    def accuracy(ids: Tensor, labels: Tensor) -> float:
        right = torch.tensor(0)
        rows = max(1, 65536 // context)
        for row, label in zip(ids.split(rows), labels.split(rows), strict=True):
            with products():
                guess = model(row.to(DEVICE), use_cache=False).logits[:, :-1].argmax(-1).cpu()
            right = right + ((guess == label[:, 1:]) & (label[:, 1:] != IGNORE)).sum()
        return float(right / (labels[:, 1:] != IGNORE).sum())

    by_lag = {}
    for lag in (lag for kind in settings["lags"].values() for lag in kind):
        ids, value = at_lag(128, context - 1, lag, pairs, generator)
        filled = torch.cat([ids, value[:, None]], dim=1)
        labels = torch.where(torch.arange(context) == context - 1, filled, IGNORE)
        by_lag[str(lag)] = accuracy(filled, labels)
    held_out = [accuracy(*sequences(128, context, pairs, settings["asks"], generator)) for _ in range(2)]
    field = receptive_field(made.patterns(), context)
    return {
        "validation": held_out[0],
        "test": held_out[1],
        "by lag": by_lag,
        **{kind: statistics.fmean(by_lag[str(lag)] for lag in lags) for kind, lags in settings["lags"].items()},
        "coverage": field.covered() / context,
        "training loss": last,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def lags(context: int, window: int, period: int) -> dict[str, list[int]]:
    """Lags inside the window, and far ones to three quarters of the context, on and beside multiples of the period."""
    aligned = sorted({max(1, context * share // 16 // period) * period for share in (1, 2, 4, 8, 12)})
    return {
        "near": [1, window // 2, window - 1],
        "aligned": aligned,
        "beside": [lag + period // 2 + 1 for lag in aligned],
    }


CONTROLS = (COORDINATED_HEADS, ONE_DENSE, ONE_GLOBAL)
"""The best form of language models, and windows with one layer that sees everything."""


def cells(scale: Scale) -> list[Settings]:
    """Every variant where four layers cover the context and where they leave holes; passkeys in longer contexts."""
    if scale == "laptop":
        return []
    common = {"hidden": 64, "layers": 4, "heads": 4}
    if scale == "smoke":
        common = {"hidden": 32, "layers": 2, "heads": 2, "steps": 2}
        shapes = [(8, 8, 4, {"context": 64, "pairs": 4, "asks": 3, "batch": 4}, (*VARIANTS, PLANNED))]
        longer = {"context": 64, "pairs": 1, "asks": 3, "batch": 4, "shorter first": [32]}
        shapes.append((8, 8, 4, longer, ("pi",)))
    else:
        recall = {"context": 512, "pairs": 4, "asks": 7, "batch": 64, "steps": 1500}
        shapes = [
            (16, 16, 8, recall, (*VARIANTS, PLANNED, *CONTROLS)),
            (4, 64, 4, recall, (*MAIN, "pi, geometric heads", PLANNED, *CONTROLS)),
        ]
        passkey = {"context": 1024, "pairs": 1, "asks": 31, "batch": 32, "steps": 1000}
        for more in ({}, {"layers": 2}, {"layers": 8}):
            shapes.append((64, 64, 16, passkey | more, (*MAIN, "pi, geometric heads", PLANNED, *CONTROLS)))
        for context, shorter in ((8192, [1024, 2048, 4096]), (32768, [1024, 2048, 4096, 8192, 16384])):
            longer = {"context": context, "asks": context // 32 - 1, "batch": 32768 // context}
            by_length = {"steps": 1000 * (len(shorter) + 1), "shorter first": shorter}
            shapes.append((64, 64, 16, passkey | longer | by_length, (*MAIN, PLANNED, *CONTROLS)))
    return [
        {"variant": variant, "window": w, "period": period, "skips": m, **common, **task}
        | {"lags": lags(task["context"], w, period)}
        for w, period, m, task, variants in shapes
        for variant in variants
    ]


EXPERIMENT = Experiment(
    name="recall",
    title="Recall at a distance",
    metric="accuracy",
    better="higher",
    cells=cells,
    measure=measure,
    rates=(1e-3, 3e-3),
    seeds=5,
)
