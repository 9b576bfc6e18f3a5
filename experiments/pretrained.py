"""A pretrained decoder in longer contexts: its dense layers become patterns, and all of its weights train on.

Texts are neighbouring files of a corpus, read as one. Every form sees the same tokens in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from experiments.data import prepared
from experiments.decoders import decoder_of, tokenizer_of
from experiments.experiment import Experiment, Result, Scale, Settings
from experiments.language_losses import BUCKETS, over_blocks
from experiments.pass_keys import asked, needles
from experiments.recurrence import by_recurrence
from experiments.texts import Documents, blocks, corpus, encoded, file_name, split, windows
from experiments.training import DEVICE, Batch, Pace, fit
from pi_attention.convert import convert, dense_gains, neediest
from pi_attention.convert.extension import far_layers, slower_rotary
from pi_attention.data.tokenizers import beginning
from pi_attention.heads import coordinated_heads
from pi_attention.models.loss import cross_entropy
from pi_attention.pattern import PiPattern
from pi_attention.stack import DENSE

SINKS = 4
SLICE = 2048
"""Tokens whose logits exist at a time: those of a long text and a large vocabulary fill a GPU."""
NEIGHBOURS = 32
"""Contexts of characters that are joined to a text: some eight contexts of tokens."""
EVERY = 6
"""Of the hybrids: one layer in so many stays dense."""
CHOSEN, FEWER = 5, 2
"""Of other hybrids: so many layers stay dense, those that give most of the loss back; 5 of 30 are 1 in 6."""
ALIKE, COORDINATED, WHOLE = "window + sinks", "coordinated heads + sinks", "dense"
MAIN = (ALIKE, COORDINATED, WHOLE)
ALL_SKIPS, BEST = "coordinated heads, all skips", f"{ALIKE} + {CHOSEN} chosen dense, slower alone"
SAME_TIME = {WHOLE: 450, ALIKE: 896, COORDINATED: 793}
"""Steps that a form trains in the time of 763 steps of the best one: 207 s of an H200, by the tokens a second of
rows that ran alone."""


@dataclass(frozen=True)
class Form:
    """What the layers of a decoder see that saw everything: all of them a pattern, or some."""

    pattern: PiPattern
    every: int | None = None
    """One layer in so many stays dense; None converts all."""
    gate: bool = False
    chosen: int | None = None
    """So many layers stay dense, chosen by what they give back; None chooses none."""
    apart: bool = False
    """Turn slower in the chosen layers alone, not in all. So sinks of the others move along beyond the pretraining's
    context, which they do not where all layers turn slower."""

    def layers(self, count: int, gains: dict[int, float] | None = None) -> list[int] | None:
        """The converted ones of `count` layers. Where `gains` of chosen ones are unknown, the first stand for them."""
        if self.chosen is not None:
            kept = neediest(dict.fromkeys(range(count), 0.0) if gains is None else gains, min(self.chosen, count - 1))
            return [layer for layer in range(count) if layer not in kept]
        every = self.every
        return None if every is None else [i for i in range(count) if i % every != every // 2]

    def patterns(self, count: int) -> list[PiPattern]:
        """Of `count` layers that saw everything."""
        chosen = self.layers(count)
        return [self.pattern if chosen is None or layer in chosen else DENSE for layer in range(count)]

    def sees_beyond(self, context: int) -> bool:
        """Whether some layer sees keys that are further away."""
        return bool(far_layers(self.patterns(EVERY), context))


def forms(keys: int, heads: int) -> dict[str, Form]:
    """By name, the most important first.

    A query of a converted layer sees `keys` keys at most, of which a fifth are in the window and 4 are sinks.
    """
    fifth = max(1, keys // 5)
    skips = keys - fifth - SINKS
    window = PiPattern(keys - SINKS, 1, 0, sinks=SINKS)
    coordinated = coordinated_heads(fifth, skips, heads, sinks=SINKS)
    return {
        ALIKE: Form(window),
        COORDINATED: Form(coordinated),
        WHOLE: Form(DENSE),
        f"{ALIKE} + dense, 1 in {EVERY}": Form(window, EVERY),
        f"{ALIKE} + dense, 1 in {EVERY}, slower alone": Form(window, EVERY, apart=True),
        f"{ALIKE} + {CHOSEN} chosen dense": Form(window, chosen=CHOSEN),
        BEST: Form(window, chosen=CHOSEN, apart=True),
        f"{ALIKE} + {FEWER} chosen dense, slower alone": Form(window, chosen=FEWER, apart=True),
        f"{COORDINATED} + {CHOSEN} chosen dense, slower alone": Form(coordinated, chosen=CHOSEN, apart=True),
        f"{COORDINATED} + dense, 1 in {EVERY}": Form(coordinated, EVERY),
        ALL_SKIPS: Form(coordinated_heads(fifth, None, heads, sinks=SINKS)),
        "single period + sinks": Form(PiPattern(skips, skips, fifth, sinks=SINKS)),
        f"{COORDINATED}, gate": Form(coordinated, gate=True),
    }


VARIANTS = tuple(forms(keys=1024, heads=9))


def let_all_turn_slower(model: Any, context: int) -> None:
    """All layers of a decoder turn as slowly as `convert` lets those that see beyond the pretraining's context."""
    rotary: Any = slower_rotary(model, context)
    model.base_model.rotary_emb = rotary
    model.config.rope_parameters, model.config.max_position_embeddings = rotary.config.rope_parameters, context


def converted_layers(model: Any, form: Form, settings: Settings, data: Path) -> list[int] | None:
    """Those of a form; what a layer gives back when dense is measured on four blocks that the pretraining knows."""
    config = model.config
    if form.chosen is None:
        return form.layers(config.num_hidden_layers)
    known = min(settings["context"], config.max_position_embeddings)
    training = documents(settings["corpus"], settings["pretrained"], settings["context"], data)["training"]
    ids = begun(blocks(training, known, 4)[0], beginning(tokenizer_of(settings["pretrained"], data)))
    gains = dense_gains(model.eval(), form.pattern, lambda tried: float(over_blocks(Sliced(tried).losses, ids).mean()))
    return form.layers(config.num_hidden_layers, gains)


def decoder(settings: Settings, data: Path) -> Any:
    """The pretrained model of a row in its form."""
    model = decoder_of(settings["pretrained"], data).to(DEVICE)
    made = forms(settings["keys"], model.config.num_attention_heads)
    if settings["variant"] not in made:
        raise ValueError(f"variant={settings['variant']!r} is unknown: use one of {list(made)}.")
    form = made[settings["variant"]]
    layers, known = converted_layers(model, form, settings, data), model.config.max_position_embeddings
    further = settings["context"] if form.sees_beyond(known) and settings["context"] > known else None
    if further is not None and not form.apart:
        let_all_turn_slower(model, further)
        further = None
    return convert(model, form.pattern, gate=form.gate, layers=layers, extend_to=further)


class Sliced(nn.Module):
    """A decoder of transformers whose losses are computed `SLICE` tokens at a time, in the backward pass again."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def losses(self, input_ids: Tensor) -> Tensor:
        """Of predicting each token of [B, T] from the second on, [B, T − 1]."""
        out = self.model(input_ids=input_ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        head = self.model.get_output_embeddings()

        def loss(hidden: Tensor, target: Tensor) -> Tensor:
            return cross_entropy(head(hidden), target, "none")

        parts = zip(out.hidden_states[-1][:, :-1].split(SLICE, 1), input_ids[:, 1:].split(SLICE, 1), strict=True)
        found = [checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.cat(found, dim=1)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """The mean loss."""
        return SimpleNamespace(loss=self.losses(input_ids).mean())


def neighbours(texts: list[str], least: int) -> list[str]:
    """Successive texts joined by line breaks, until each has `least` characters; what is left at the end is dropped."""
    found, gathered, size = [], list[str](), 0
    for text in texts:
        gathered.append(text)
        size += len(text)
        if size >= least:
            found.append("\n".join(gathered))
            gathered, size = [], 0
    return found


@cache
def documents(name: str, pretrained: str, context: int, data: Path) -> dict[str, Documents]:
    """Tokens of the training, validation and test texts of a corpus."""

    def arrays() -> dict[str, np.ndarray]:
        texts = neighbours(corpus(name, data), NEIGHBOURS * context)
        return encoded(texts, tokenizer_of(pretrained, data).backend_tokenizer)

    return split(prepared(data, f"{file_name(name)}-{pretrained}-{context}", arrays))


def begun(ids: Tensor, first: list[int]) -> Tensor:
    """Rows [N, T] that begin with what the tokenizer puts before a text; the last tokens make room."""
    return torch.cat([torch.tensor(first, dtype=ids.dtype).expand(len(ids), -1), ids], dim=1)[:, : ids.shape[1]]


def measure(settings: Settings, data: Path) -> Result:
    """Train a form on; perplexities a token of long texts, of short ones of another kind, and pass keys that are found.

    "untrained" is the test perplexity before the training, "short" that of short texts before and after it.
    """
    torch.manual_seed(settings["seed"])
    context, pretrained = settings["context"], settings["pretrained"]
    tokenizer, parts = tokenizer_of(pretrained, data), documents(settings["corpus"], pretrained, context, data)
    first = beginning(tokenizer)
    model = Sliced(decoder(settings, data)).eval()
    short = encoded(corpus(settings["other"], data), tokenizer.backend_tokenizer)["tokens"]
    held_out = {
        part: begun(blocks(parts[part], context, settings["blocks"])[0], first) for part in ("validation", "test")
    }
    held_out["short"] = begun(blocks([short], settings["short"], settings["blocks"])[0], first)
    before = {part: math.exp(float(over_blocks(model.losses, held_out[part]).mean())) for part in ("test", "short")}
    generator = torch.Generator().manual_seed(1 + settings["seed"])
    drawn: Iterator[Batch] = (
        {"input_ids": begun(ids, first)} for ids in windows(parts["training"], context, 1, generator)
    )
    pace = Pace()
    last = fit(model, drawn, steps=settings["steps"], rate=settings["rate"], pace=pace)
    found = {part: over_blocks(model.losses, ids) for part, ids in held_out.items()}
    perplexity = {part: math.exp(float(loss.mean())) for part, loss in found.items()}
    result: Result = {
        "validation": perplexity["validation"],
        "test": perplexity["test"],
        "untrained": before["test"],
        "short": [before["short"], perplexity["short"]],
        "by position": [math.exp(float(part.mean())) for part in found["test"].tensor_split(BUCKETS, dim=1)],
        "by recurrence": by_recurrence(found["test"], held_out["test"], settings["keys"]),
        "pass keys": needles(model.model, parts["test"], settings["lengths"], tokenizer),
        "training loss": last,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dense layers": [i for i, pattern in enumerate(model.model.config.patterns()) if pattern == DENSE],
    }
    return result if math.isnan(pace.steps_a_second) else result | {"tokens/s": round(pace.steps_a_second * context)}


def prepare(settings: Settings, data: Path) -> None:
    """Encode the corpus; whatever is missing or too short fails here, not after training."""
    parts = documents(settings["corpus"], settings["pretrained"], settings["context"], data)
    for part in ("validation", "test"):
        blocks(parts[part], settings["context"], 1)
    asked(parts["test"], min(settings["lengths"]), 0.5, tokenizer_of(settings["pretrained"], data), 0)


def cells(scale: Scale) -> list[Settings]:
    """All forms with 25 M tokens, the main ones first; in equal time; Gemma's global layers; then 100 M tokens."""
    toy: Settings = {"pretrained": "toy-decoder", "corpus": "shakespeare", "other": "shakespeare", "keys": 32,
                     "context": 256, "short": 64, "lengths": [128], "steps": 2, "blocks": 2}  # fmt: skip
    real: Settings = {"pretrained": "smollm2", "corpus": "kernel", "other": "shakespeare", "keys": 1024,
                      "context": 32768, "short": 2048, "lengths": [2048, 8192, 32768], "blocks": 48}  # fmt: skip
    if scale == "laptop":
        return []
    if scale == "smoke":
        return [toy | {"variant": variant} for variant in VARIANTS]
    few, many = {"steps": 763}, {"steps": 3052}
    gemma = real | {"pretrained": "gemma3"}
    made = [real | few | {"variant": variant} for variant in VARIANTS]
    made += [real | {"steps": steps, "variant": variant} for variant, steps in SAME_TIME.items()]
    made += [gemma | few | {"variant": variant} for variant in (*MAIN, ALL_SKIPS)]
    return made + [real | many | {"variant": variant} for variant in (*MAIN, BEST)]


def guessed_seconds(settings: Settings) -> float:
    """On an H200: SmolLM2's coordinated heads took 250 s, five dense layers 28 s more; those of Gemma 414 s."""
    tokens, gemma = settings["steps"] * settings["context"], settings["pretrained"] == "gemma3"
    share = {WHOLE: 1.0, ALL_SKIPS: 0.25}.get(settings["variant"], 0.0)
    share = 1 / EVERY if f"1 in {EVERY}" in settings["variant"] or "chosen" in settings["variant"] else share
    return 50 + tokens * (14.5e-6 + share * 1e-6 if gemma else 8e-6 + share * 7e-6)


EXPERIMENT = Experiment(
    name="pretrained",
    title="A pretrained model in longer contexts",
    metric="perplexity",
    better="lower",
    cells=cells,
    measure=measure,
    rates=(2e-4,),
    prepare=prepare,
    seconds=guessed_seconds,
)
