"""Recall at a distance: where do the holes of a pattern show? Multi-query associative recall with lags under control.

A sequence holds pairs of a key and a value among filler tokens; later a key comes again, and its value is to be
predicted. The lag from the query to the value is drawn freely in training; tests put a single query at each lag.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from experiments.runner import Experiment, Result, Scale, Settings
from experiments.training import DEVICE, fit, products
from experiments.variants import VARIANTS, config, prepare_gate
from pi_attention.models import PiForCausalLM
from pi_attention.receptive_field import receptive_field

KEYS, VALUES, FILLER = 16, 16, 8
VOCABULARY = KEYS + VALUES + FILLER
IGNORE = -100


def sequences(batch: int, context: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Input ids and labels [batch, context]: `pairs` keys with values, each asked for once at a random later place."""

    def draw(count: int, most: int) -> Tensor:
        return torch.rand(batch, most, generator=generator).argsort(dim=1)[:, :count]

    ids = KEYS + VALUES + torch.randint(FILLER, (batch, context), generator=generator)
    labels = torch.full_like(ids, IGNORE)
    keys = draw(pairs, KEYS)
    values = KEYS + torch.randint(VALUES, (batch, pairs), generator=generator)
    places = draw(2 * pairs, context - 2 * pairs).sort(dim=1).values + torch.arange(
        2 * pairs
    )  # room for two tokens each
    shuffled = places.gather(1, draw(2 * pairs, 2 * pairs))
    slots = shuffled.view(batch, pairs, 2).sort(dim=2).values
    for slot in slots.unbind(dim=2):  # shown, then asked
        ids.scatter_(1, slot, keys)
        ids.scatter_(1, slot + 1, values)
    labels.scatter_(1, slots[:, :, 1] + 1, values)  # the model shifts labels: predicted at the key
    return ids, labels


def at_lag(batch: int, context: int, lag: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Input ids [batch, context] that end in a key whose value stands `lag` tokens before it, and these values.

    The other `pairs` − 1 keys stand with their values at random places.
    """
    ids = KEYS + VALUES + torch.randint(FILLER, (batch, context), generator=generator)
    keys = torch.rand(batch, KEYS, generator=generator).argsort(dim=1)[:, :pairs]
    values = KEYS + torch.randint(VALUES, (batch, pairs), generator=generator)
    shown = context - 2 - lag
    odd = shown % 2  # the places of all pairs are shifted by one where that of the pair asked for is odd
    order = torch.rand(batch, (context - 1 - odd) // 2, generator=generator)
    order[:, shown // 2] = 2.0
    slots = odd + 2 * order.argsort(dim=1)[:, : pairs - 1]
    ids.scatter_(1, slots, keys[:, 1:])
    ids.scatter_(1, slots + 1, values[:, 1:])
    ids[:, -1] = ids[:, shown] = keys[:, 0]
    ids[:, shown + 1] = values[:, 0]
    return ids, values[:, 0]


def measure(settings: Settings, data: Path) -> Result:
    """Train a variant, then its accuracy at every lag of `lags`, and on sequences as in training."""
    torch.manual_seed(settings["seed"])
    generator = torch.Generator().manual_seed(1 + settings["seed"])
    context, pairs = settings["context"], settings["pairs"]
    made = config(settings, vocab_size=VOCABULARY)
    model = prepare_gate(PiForCausalLM(made).to(DEVICE), settings["variant"])

    def batches() -> Iterator[dict[str, Tensor]]:
        while True:
            ids, labels = sequences(settings["batch"], context, pairs, generator)
            yield {"input_ids": ids, "labels": labels}

    last = fit(model, batches(), steps=settings["steps"], rate=settings["rate"])

    @torch.no_grad()
    def accuracy(ids: Tensor, labels: Tensor) -> float:
        with products():
            guess = model(ids.to(DEVICE), use_cache=False).logits[:, :-1].argmax(-1).cpu()
        asked = labels[:, 1:] != IGNORE
        return float((guess == labels[:, 1:])[asked].float().mean())

    by_lag = {}
    for lag in settings["lags"]:
        ids, value = at_lag(128, context - 1, lag, pairs, generator)
        filled = torch.cat([ids, value[:, None]], dim=1)
        labels = torch.where(torch.arange(context) == context - 1, filled, IGNORE)
        by_lag[str(lag)] = accuracy(filled, labels)
    held_out = [accuracy(*sequences(128, context, pairs, generator)) for _ in range(2)]
    field = receptive_field(made.patterns(), context)
    return {
        "validation": held_out[0],
        "test": held_out[1],
        "by lag": by_lag,
        "over lags": statistics.fmean(by_lag.values()),
        "coverage": field.covered() / context,
        "training loss": last,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def cells(scale: Scale) -> list[Settings]:
    """Every variant at a pattern without holes and at one with holes; lags on and beside multiples of the period."""
    if scale == "laptop":
        return []
    common = {"hidden": 64, "layers": 4, "heads": 4, "context": 512, "pairs": 4, "steps": 4000, "batch": 64}
    common["lags"] = [4, 15, 16, 32, 41, 64, 73, 128, 137, 256, 265, 400]
    shapes = [(16, 16, 8), (4, 64, 4)]
    if scale == "smoke":
        common |= {"hidden": 32, "layers": 2, "heads": 2, "context": 64, "pairs": 4, "steps": 2, "batch": 4}
        common["lags"] = [3, 17]
        shapes = [(8, 8, 4)]
    return [
        {"variant": variant, "window": w, "period": period, "skips": m, **common}
        for w, period, m in shapes
        for variant in VARIANTS
    ]


EXPERIMENT = Experiment(
    name="recall",
    title="Recall at a distance",
    metric="accuracy",
    better="higher",
    cells=cells,
    measure=measure,
    rates=(3e-3,),
)
