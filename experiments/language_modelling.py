"""Language modelling: perplexity of every variant on long documents, by position, and transferred to WikiText-103."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from experiments.experiment import Experiment, Result, Scale, Settings
from experiments.language_losses import BUCKETS, by_document, gates, is_transferred, losses, wikitext
from experiments.recurrence import by_recurrence
from experiments.texts import Documents, blocks, bpe, documents, windows
from experiments.training import DEVICE, Batch, fit_by_length, shares, steps_by_length, steps_within
from experiments.variants import (
    BASELINE,
    COORDINATED,
    DILATED_HEADS,
    HYBRIDS,
    MAIN,
    PLANNED,
    RANDOM_BLOCKS,
    VARIANTS,
    config,
    specialise,
)
from pi_attention.models import PiForCausalLM

SIZES: dict[Scale, Settings] = {
    "smoke": {"corpus": "shakespeare", "vocabulary": 512, "hidden": 32, "layers": 2, "heads": 2, "steps": 2,
              "tokens": 512, "blocks": 2},
    "laptop": {"corpus": "shakespeare", "vocabulary": 1024, "hidden": 128, "layers": 4, "heads": 4, "steps": 200,
               "tokens": 4096, "blocks": 24},
    "small": {"corpus": "linux", "vocabulary": 8192, "hidden": 256, "layers": 6, "heads": 4, "steps": 500,
              "tokens": 32768, "blocks": 96},
}  # fmt: skip
"""`tokens` of a step, `blocks` of an evaluation."""
LONGER: Settings = SIZES["small"] | {"corpus": "prose", "hidden": 512, "layers": 8, "heads": 8}
LONG: Settings = SIZES["small"] | {"steps": 4000}
LARGE: Settings = SIZES["small"] | {"hidden": 768, "layers": 14, "heads": 12, "steps": 1000}


def train(model: PiForCausalLM, settings: Settings, pieces: Documents) -> Result:
    """Train in place for the steps of the settings, in all or at each length; without steps, for their seconds."""

    def batches(length: int, generator: torch.Generator) -> Iterator[Batch]:
        drawn = windows(pieces, length, max(1, settings["tokens"] // length), generator)
        return ({"input_ids": ids, "labels": ids} for ids in drawn)

    asked = settings.get("steps")
    if asked is None:
        steps = {
            length: steps_within(model, batches(length, torch.Generator()), share * settings["seconds"])
            for length, share in shares(settings).items()
        }
    elif isinstance(asked, list):
        steps = dict(zip(shares(settings), asked, strict=True))
    else:
        steps = steps_by_length(settings)
    drawn = partial(batches, generator=torch.Generator().manual_seed(1 + settings["seed"]))
    last, pace = fit_by_length(model, drawn, steps, rate=settings["rate"])
    result = {"training loss": last, "steps": list(steps.values())}
    return result if math.isnan(pace) else result | {"tokens/s": round(pace * settings["tokens"])}


def measure(settings: Settings, data: Path) -> Result:
    """Train one variant; the result has perplexities a token."""
    torch.manual_seed(settings["seed"])
    parts = documents(settings["corpus"], settings["vocabulary"], data)
    context = settings["context"]
    model = PiForCausalLM(config(settings, vocab_size=settings["vocabulary"])).to(DEVICE)
    specialise(model, settings)
    training = train(model, settings, parts["training"])
    held_out = {part: blocks(parts[part], context, settings["blocks"]) for part in ("validation", "test")}
    found = {part: losses(model, ids) for part, (ids, _) in held_out.items()}
    test, ids = found["test"], held_out["test"][0]
    keys = settings["keys"] if "keys" in settings else settings["window"] + settings["skips"]
    result: Result = {
        "validation": math.exp(float(found["validation"].mean())),
        "test": math.exp(float(test.mean())),
        "loss by document": {part: by_document(found[part], owners) for part, (_, owners) in held_out.items()},
        "by position": [math.exp(float(part.mean())) for part in test.tensor_split(BUCKETS, dim=1)],
        "by recurrence": by_recurrence(test, ids, keys),
        **training,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if is_transferred(settings["corpus"]):
        other, ratio = wikitext(settings["corpus"], settings["vocabulary"], context, data)
        result["wikitext-103 word perplexity"] = math.exp(float(losses(model, other).mean()) * ratio)
    if model.config.gate:
        tokenizer = bpe(settings["corpus"], settings["vocabulary"], data)
        result["gate"] = gates(model, ids[0], tokenizer)
    return result


def guessed_seconds(settings: Settings) -> float:
    """What a row takes on an H100: fitted to rows of 9 M to 124 M parameters, with products of dense attention."""
    hidden, layers, vocabulary = (settings[name] for name in ("hidden", "layers", "vocabulary"))
    parameters = 12 * layers * hidden**2 + 2 * vocabulary * hidden
    a_token = 0.25e-6 + 16e-15 * parameters + 12e-15 * layers * hidden * settings["context"]
    spent = settings["seconds"] if "seconds" in settings else a_token * settings["steps"] * settings["tokens"]
    return 25 + spent


def prepare(settings: Settings, data: Path) -> None:
    """Train the tokenizer and encode the corpus; whatever is missing or too short fails here, not after training."""
    name, vocabulary, context = settings["corpus"], settings["vocabulary"], settings["context"]
    parts = documents(name, vocabulary, data)
    next(windows(parts["training"], context, 1, torch.Generator()))
    for part in ("validation", "test"):
        blocks(parts[part], context, 1)
    if is_transferred(name):
        wikitext(name, vocabulary, context, data)


PATTERN: Settings = {"window": 64, "period": 64, "skips": 16}


def cells(scale: Scale) -> list[Settings]:
    """Every variant at the shortest context, the main ones at a longer one, with larger models and other documents."""
    groups: dict[Scale, list[tuple[int, Settings, tuple[str, ...]]]] = {
        "smoke": [(256, SIZES["smoke"], (*MAIN, RANDOM_BLOCKS))],
        "laptop": [(1024, SIZES["laptop"], MAIN)],
        "small": [
            (2048, SIZES["small"], (*VARIANTS, RANDOM_BLOCKS)),
            (16384, SIZES["small"], (*MAIN, DILATED_HEADS)),
            (8192, LONGER, (*MAIN, "pi, no gate", "window + sinks")),
        ],
    }
    return [
        {"variant": variant, **PATTERN, "context": context, **sizes}
        for context, sizes, variants in groups[scale]
        for variant in variants
    ]


def long_cells(scale: Scale) -> list[Settings]:
    """Eight times the tokens, where the first comparison stops early."""
    sizes = {"smoke": SIZES["smoke"], "small": LONG}.get(scale)
    if sizes is None:
        return []
    variants = ["dense", BASELINE, "pi", "pi, mass gate", "pi, no gate", "dilated", PLANNED, DILATED_HEADS]
    variants += [*COORDINATED, *HYBRIDS]
    common = {"context": 2048 if scale == "small" else 256, **sizes}
    wider = [{"variant": "pi", "window": 16, "period": 32, "skips": 64, **common}]  # more skips for the same keys
    return [{"variant": variant, **PATTERN, **common} for variant in variants] + wider


def large_cells(scale: Scale) -> list[Settings]:
    """The main variants with 112 M parameters."""
    sizes = {"smoke": SIZES["smoke"], "small": LARGE}.get(scale)
    context = 8192 if scale == "small" else 256
    return [{"variant": v, **PATTERN, "context": context, **sizes} for v in (*MAIN, DILATED_HEADS) if sizes]


EXPERIMENT = Experiment(
    name="language_modelling",
    title="Language modelling",
    metric="test perplexity a token",
    better="lower",
    cells=cells,
    measure=measure,
    rates=(1e-3, 3e-3),
    prepare=prepare,
    seconds=guessed_seconds,
)
LONG_EXPERIMENT = replace(
    EXPERIMENT,
    name="language_modelling_long",
    title="Language modelling, eight times the tokens",
    cells=long_cells,
    rates=(3e-3,),
)
LARGE_EXPERIMENT = replace(
    EXPERIMENT,
    name="language_modelling_large",
    title="Language modelling with 112 M parameters",
    cells=large_cells,
    rates=(1e-3,),
)
