"""Language modelling: perplexity of every variant on long documents, by position, and transferred to WikiText-103."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from experiments.data import need
from experiments.experiment import Experiment, Result, Scale, Settings
from experiments.texts import blocks, bpe, documents, hub, windows
from experiments.training import DEVICE, fit, products
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
from pi_attention.nn import record_aux

BUCKETS = 8
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


@torch.no_grad()
def losses(model: PiForCausalLM, held_out: Tensor) -> Tensor:
    """The loss of predicting each token [N, length − 1] of blocks [N, length]."""
    found = []
    for block in held_out.split(max(1, 16384 // held_out.shape[1])):
        ids = block.to(DEVICE)
        with products():
            logits = model(ids, use_cache=False).logits[:, :-1]
        found.append(F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none").cpu())
    return torch.cat(found)


def by_document(found: Tensor, owners: list[int]) -> list[float]:
    """The mean loss of each document, of losses [N, length − 1] of blocks and the number of each block's document."""
    owner = torch.tensor(owners)
    return [float(found[owner == number].mean()) for number in sorted(set(owners))]


def class_of(text: str) -> str:
    """What kind of token this is, by its first character that is no space."""
    kept = text.lstrip(" ")
    if not kept.strip():
        return "white space"
    if kept[0].isdigit():
        return "digits"
    if not kept[0].isalpha():
        return "punctuation"
    return "start of a word" if text != kept else "inside a word"


@torch.no_grad()
def gates(model: PiForCausalLM, block: Tensor, tokenizer: Tokenizer) -> dict[str, Any]:
    """The mean gate (share of the local band) over one block [T].

    By layer and head, by position in eighths, by class of the token that has the gate; and its spread over tokens.
    """
    with record_aux(model) as aux, products():
        model(block[None].to(DEVICE), use_cache=False)
    values = torch.stack([calls[0].gate[0].float().cpu() for calls in aux.values()])  # [L, H, T]
    by_position = torch.stack([part.mean() for part in values.tensor_split(BUCKETS, dim=-1)])
    classes = [class_of(tokenizer.decode([token])) for token in block.tolist()]
    places = {name: [i for i, found in enumerate(classes) if found == name] for name in sorted(set(classes))}
    return {
        "by head": values.mean(-1).tolist(),
        "by position": by_position.tolist(),
        "by token class": {name: float(values[:, :, rows].mean()) for name, rows in places.items()},
        "spread": float(values.std(dim=-1).mean()),
    }


@cache
def wikitext(corpus: str, vocabulary: int, length: int, data: Path) -> tuple[Tensor, float]:
    """Blocks of the real WikiText-103 test set in a corpus' tokenizer, and its tokens for each word token.

    Of a corpus that is WikiText on the hub, the test set of that.
    """
    if corpus.partition(":")[0].endswith("/wikitext"):
        text = "".join(hub(corpus, "test"))
    else:
        text = need(data / "wikitext-103" / "wiki.test.tokens", "WikiText-103's test file").read_text(encoding="utf-8")
    ids = bpe(corpus, vocabulary, data).encode(text).ids
    kept = len(ids) // length * length
    words = len(text.split()) + text.count("\n")  # <eos> for each line, as is the custom
    return torch.tensor(ids[:kept]).view(-1, length), len(ids) / words


def measure(settings: Settings, data: Path) -> Result:
    """Train one variant; the result has perplexities a token."""
    torch.manual_seed(settings["seed"])
    generator = torch.Generator().manual_seed(1 + settings["seed"])
    parts = documents(settings["corpus"], settings["vocabulary"], data)
    context = settings["context"]
    model = PiForCausalLM(config(settings, vocab_size=settings["vocabulary"])).to(DEVICE)
    specialise(model, settings)
    drawn = windows(parts["training"], context, max(1, settings["tokens"] // context), generator)
    batches = ({"input_ids": ids, "labels": ids} for ids in drawn)
    last = fit(model, batches, steps=settings["steps"], rate=settings["rate"])
    held_out = {part: blocks(parts[part], context, settings["blocks"]) for part in ("validation", "test")}
    found = {part: losses(model, ids) for part, (ids, _) in held_out.items()}
    test = found["test"]
    result: Result = {
        "validation": math.exp(float(found["validation"].mean())),
        "test": math.exp(float(test.mean())),
        "loss by document": {part: by_document(found[part], owners) for part, (_, owners) in held_out.items()},
        "by position": [math.exp(float(part.mean())) for part in test.tensor_split(BUCKETS, dim=1)],
        "training loss": last,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if settings["corpus"] != "shakespeare":
        other, ratio = wikitext(settings["corpus"], settings["vocabulary"], context, data)
        result["wikitext-103 word perplexity"] = math.exp(float(losses(model, other).mean()) * ratio)
    if model.config.gate:
        tokenizer = bpe(settings["corpus"], settings["vocabulary"], data)
        result["gate"] = gates(model, held_out["test"][0][0], tokenizer)
    return result


def prepare(settings: Settings, data: Path) -> None:
    """Train the tokenizer and encode the corpus; whatever is missing or too short fails here, not after training."""
    name, vocabulary, context = settings["corpus"], settings["vocabulary"], settings["context"]
    parts = documents(name, vocabulary, data)
    next(windows(parts["training"], context, 1, torch.Generator()))
    for part in ("validation", "test"):
        blocks(parts[part], context, 1)
    if name != "shakespeare":
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
