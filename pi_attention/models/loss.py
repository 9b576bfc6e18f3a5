"""The loss of a language model whose logits never exist together: those of a long text would fill a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
"""Label of what is not to be predicted."""


def sliced_loss(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    size: int,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Mean cross-entropy of each next token, by slices whose logits are computed again in the backward pass.

    Args:
        head: features [N, hidden] -> logits [N, vocab].
        hidden: [B, T, hidden].
        labels: [B, T] token ids, not shifted; −100 is ignored.
        size: tokens of a slice.
        shift_labels: [B, T] the labels shifted already, instead of `labels`.
        num_items_in_batch: what the sum is divided by; the number of predicted tokens when None.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE) if shift_labels is None else shift_labels

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets.to(logits.device), ignore_index=IGNORE, reduction="sum")

    slices = zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
    sums = [checkpoint(part, *piece, use_reentrant=False, preserve_rng_state=False) for piece in slices]
    total = torch.stack(sums).sum()
    count = (targets != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)
