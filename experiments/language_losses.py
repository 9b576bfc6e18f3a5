"""What a language model has learned: its losses, by document and by token, its gates, and WikiText-103's perplexity."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from experiments.data import need
from experiments.texts import bpe, hub
from experiments.training import DEVICE, products
from pi_attention.models import PiForCausalLM
from pi_attention.models.loss import cross_entropy
from pi_attention.nn import record_aux

BUCKETS = 8
"""Parts of the context that are looked at apart."""


@torch.no_grad()
def over_blocks(losses_of: Callable[[Tensor], Tensor], held_out: Tensor) -> Tensor:
    """The losses [N, length − 1] of blocks [N, length], asked for a few blocks at a time, on the device."""
    found = []
    for block in held_out.split(max(1, 16384 // held_out.shape[1])):
        with products():
            found.append(losses_of(block.to(DEVICE)).cpu())
    return torch.cat(found)


def losses(model: PiForCausalLM, held_out: Tensor) -> Tensor:
    """The loss of predicting each token [N, length − 1] of blocks [N, length]."""

    def losses_of(ids: Tensor) -> Tensor:
        return cross_entropy(model(ids, use_cache=False).logits[:, :-1], ids[:, 1:], "none")

    return over_blocks(losses_of, held_out)


def by_document(found: Tensor, owners: list[int]) -> list[float]:
    """The mean loss of each document, of losses [N, length − 1] of blocks and the number of each block's document."""
    owner = torch.tensor(owners)
    return [round(float(found[owner == number].mean()), 4) for number in sorted(set(owners))]


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


def is_transferred(corpus: str) -> bool:
    """Whether WikiText-103 is tried, too."""
    return corpus in ("linux", "prose") or "/" in corpus
