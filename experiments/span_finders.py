"""Models that mark where an answer starts and ends: of our own, or a pretrained decoder of transformers, converted."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from experiments.decoders import decoder_of, tokenizer_of
from experiments.experiment import Settings
from experiments.texts import bpe, documents, windows
from experiments.training import DEVICE, fit
from experiments.variants import CLAIMED, WITH_SINKS, attention, config, specialise
from pi_attention.convert import convert
from pi_attention.models import PiForCausalLM, PiForQuestionAnswering
from pi_attention.pattern import PiPattern


def from_language_model(settings: Settings, data: Path) -> tuple[PiForQuestionAnswering, Tokenizer]:
    """A bidirectional `PiForQuestionAnswering` that starts from a language model of its variant, trained here."""
    vocabulary = settings["vocabulary"]
    model = PiForQuestionAnswering(config(settings, vocab_size=vocabulary, causal=False)).to(DEVICE)
    language_model = specialise(PiForCausalLM(config(settings, vocab_size=vocabulary)).to(DEVICE), settings)
    parts = documents(settings["corpus"], vocabulary, data)
    generator = torch.Generator().manual_seed(1 + settings["seed"])
    drawn = windows(parts["training"], settings["context"], settings["batch"], generator)
    batches = ({"input_ids": ids, "labels": ids} for ids in drawn)
    fit(language_model, batches, steps=settings["pretraining"], rate=settings["rate"])
    model.base_model.load_state_dict(language_model.model.state_dict())
    return specialise(model, settings), bpe(settings["corpus"], vocabulary, data)


class CausalSpanFinder(nn.Module):
    """A causal language model whose head gives two logits a token, of being the first and the last of the answer.

    Args:
        model: of transformers, with `lm_head`, which is replaced.
        hidden: its features.
    """

    def __init__(self, model: Any, hidden: int) -> None:
        super().__init__()
        self.model = model
        model.set_output_embeddings(nn.Linear(hidden, 2))

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> QuestionAnsweringModelOutput:
        """Logits [B, T], and the loss where positions [B] are given; the padding is on the right, and goes unseen."""
        logits = self.model(input_ids=input_ids, use_cache=False).logits.float()
        first, last = logits.masked_fill(segment_ids[..., None] < 0, float("-inf")).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (F.cross_entropy(first, start_positions) + F.cross_entropy(last, end_positions)) / 2
        return QuestionAnsweringModelOutput(loss=loss, start_logits=first, end_logits=last)


CONVERTIBLE = (*CLAIMED, *WITH_SINKS)
"""The variants that a pretrained model can be given."""


def pattern_of(settings: Settings, heads: int) -> PiPattern | None:
    """The pattern of a variant; None for dense attention."""
    variant = settings["variant"]
    if variant not in CONVERTIBLE:
        raise ValueError(f"variant={variant!r} of a pretrained model is unknown: use one of {list(CONVERTIBLE)}.")
    said = attention({**settings, "heads": heads})
    if "layer_patterns" in said:
        return None
    return PiPattern.from_dict({field.name: said[field.name] for field in fields(PiPattern)})


def from_pretrained(settings: Settings, data: Path) -> tuple[CausalSpanFinder, Tokenizer]:
    """A pretrained causal model from `data/PRETRAINED`, converted."""
    model, tokenizer = decoder_of(settings["pretrained"], data), tokenizer_of(settings["pretrained"], data)
    hidden, heads = model.config.hidden_size, model.config.num_attention_heads
    pattern = pattern_of(settings, heads)
    if pattern is not None:
        gate = pattern.skips != 0 and attention({**settings, "heads": heads})["gate"]
        model = convert(model, pattern, gate=gate)
    return CausalSpanFinder(model, hidden).to(DEVICE), tokenizer.backend_tokenizer
