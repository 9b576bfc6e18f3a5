"""Recall at a distance: where do the holes of a pattern show? Multi-query associative recall with lags under control.

A sequence holds pairs of a key and a value among filler tokens; later a key comes again, and its value is to be
predicted. The lag from the query to the value is drawn freely in training; tests put a single query at each lag.

    python -m experiments.recall [--seeds 0 1 2] [--steps 2000]    # writes results/recall.json, finished rows are kept
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from experiments.runner import Settings, run
from experiments.variants import VARIANTS, config, freeze_half
from pi_attention.models import PiForCausalLM
from pi_attention.pattern import PiPattern

KEYS, VALUES, FILLER = 16, 16, 8
VOCABULARY = KEYS + VALUES + FILLER
IGNORE = -100


def sequences(batch: int, context: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Input ids and labels [batch, context]: `pairs` keys with values, each asked for once at a random later place."""
    ids = KEYS + VALUES + torch.randint(FILLER, (batch, context), generator=generator)
    labels = torch.full_like(ids, IGNORE)
    for row in range(batch):
        keys = torch.randperm(KEYS, generator=generator)[:pairs]
        values = KEYS + torch.randint(VALUES, (pairs,), generator=generator)
        slots = torch.randperm(context // 2, generator=generator)[: 2 * pairs].view(pairs, 2).sort(dim=1).values * 2
        for key, value, (shown, asked) in zip(keys, values, slots.tolist(), strict=True):
            ids[row, shown], ids[row, shown + 1] = key, value
            ids[row, asked], ids[row, asked + 1] = key, value
            labels[row, asked + 1] = value  # the model shifts labels: predicted at the key
    return ids, labels


def at_lag(batch: int, context: int, lag: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Input ids [batch, context] that end in a key whose value stands `lag` tokens before it, and these values."""
    ids = KEYS + VALUES + torch.randint(FILLER, (batch, context), generator=generator)
    key = torch.randint(KEYS, (batch,), generator=generator)
    value = torch.randint(VALUES, (batch,), generator=generator)
    ids[:, -1] = ids[:, -1 - lag - 1] = key
    ids[:, -1 - lag] = KEYS + value
    return ids, KEYS + value


def measure(settings: Settings) -> dict[str, Any]:
    """Train a variant, then its accuracy at every lag that is asked for.

    Args:
        settings: variant, window, period, skips, layers, context, steps, batch, seed, lags.
    """
    torch.manual_seed(settings["seed"])
    generator = torch.Generator().manual_seed(1 + settings["seed"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    context = settings["context"]
    pattern = PiPattern(settings["window"], settings["period"], settings["skips"])
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_attention_heads": 4, "qk_norm": True}
    made = config(settings["variant"], pattern, context, num_hidden_layers=settings["layers"], **sizes)
    model = PiForCausalLM(made).to(device)
    if settings["variant"] == "pi, fixed half":
        freeze_half(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings["rate"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings["rate"], total_steps=settings["steps"])
    for _ in range(settings["steps"]):
        ids, labels = sequences(settings["batch"], context, settings["pairs"], generator)
        loss = model(ids.to(device), labels=labels.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    accuracy = {}
    for lag in settings["lags"]:
        ids, values = at_lag(128, context, lag, generator)
        with torch.no_grad():
            guess = model(ids.to(device), logits_to_keep=1, use_cache=False).logits[:, -1].argmax(-1).cpu()
        accuracy[str(lag)] = float((guess == values).float().mean())
    return {"loss": loss.item(), "parameters": sum(p.numel() for p in model.parameters()), "accuracy": accuracy}


def rows(seeds: list[int], steps: int) -> list[Settings]:
    """Every variant at a pattern without holes and at one with holes; lags on and beside multiples of the period."""
    common = {"layers": 4, "context": 512, "pairs": 12, "steps": steps, "batch": 64, "rate": 3e-3}
    common["lags"] = [4, 15, 16, 32, 41, 64, 73, 128, 137, 256, 265, 400]
    patterns = [{"window": 16, "period": 16, "skips": 8}, {"window": 4, "period": 64, "skips": 4}]
    return [
        {"variant": variant, **pattern, **common, "seed": seed}
        for seed in seeds
        for pattern in patterns
        for variant in VARIANTS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    run("recall", rows(options.seeds, options.steps), measure)


if __name__ == "__main__":
    main()
