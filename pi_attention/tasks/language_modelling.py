"""Perplexity, bits per byte, and loss by position in the context."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from pi_attention.data.packing import IGNORE, PackedBlocks
from pi_attention.models.loss import cross_entropy


@dataclass
class LanguageModelling:
    """Result of an evaluation; losses in nats a token."""

    tokens: int
    """Predicted tokens."""
    loss: float
    """Mean loss."""
    perplexity: float
    """exp(loss), a token."""
    bits_per_byte: float
    """Loss by byte of UTF-8 text, in bits: comparable between tokenizers."""
    position: list[int]
    """First positions of the buckets of the context."""
    loss_by_position: list[float]
    """Mean loss of the tokens in each bucket."""


@torch.no_grad()
def evaluate(
    model: Any,
    blocks: PackedBlocks,
    *,
    batch_size: int = 1,
    buckets: int = 16,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModelling:
    """Evaluate a causal language model on packed blocks.

    Args:
        model: a `PiForCausalLM`, or a converted model; left in evaluation mode.
        blocks: of the text; blocks do not overlap, and each starts without context.
        batch_size: blocks at a time.
        buckets: parts of the context for the loss by position.
        limit: evaluate only the first so many blocks.
        progress: called with the number of blocks done and in all.

    Raises:
        ValueError: batch_size, buckets or limit is below 1, or the blocks are of one token, which predicts none.
    """
    for name, value in (("batch_size", batch_size), ("buckets", buckets), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if blocks.context < 2:
        raise ValueError(f"context must be at least 2 tokens, got {blocks.context}: one predicts the next.")
    model.eval()
    count = len(blocks) if limit is None else min(limit, len(blocks))
    loader = DataLoader(torch.utils.data.Subset(blocks, range(count)), batch_size=batch_size)
    total, seen = torch.zeros(blocks.context, dtype=torch.float64), torch.zeros(blocks.context, dtype=torch.float64)
    done = 0
    for batch in loader:
        losses, predicted = _token_losses(model, {key: x.to(model.device) for key, x in batch.items()})
        total += losses.sum(dim=0).double().cpu()
        seen += predicted.sum(dim=0).double().cpu()
        done += len(losses)
        if progress is not None:
            progress(done, count)
    if not seen.any():
        raise ValueError("no token of these blocks is predicted by one before it: the documents are of one token each.")
    loss = float(total.sum() / seen.sum())
    parts = torch.arange(blocks.context).chunk(min(buckets, blocks.context))
    return LanguageModelling(
        tokens=int(seen.sum()),
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=loss / math.log(2) / blocks.bytes_per_token,
        position=[int(part[0]) for part in parts],
        loss_by_position=[float(total[part].sum() / seen[part].sum().clamp(min=1)) for part in parts],
    )


def _token_losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Losses [B, context], 0 where nothing is predicted, and which tokens are predicted, bool."""
    logits = model(input_ids=batch["input_ids"], segment_ids=batch["segment_ids"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    losses = cross_entropy(logits[:, :-1], labels, "none")
    return F.pad(losses, (1, 0)), F.pad(labels != IGNORE, (1, 0))
