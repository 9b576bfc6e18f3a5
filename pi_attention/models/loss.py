"""The loss of a language model, also where its logits never exist together: those of a long text would fill a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
"""Label of what is not to be predicted."""


def cross_entropy(logits: Tensor, labels: Tensor, reduction: Literal["sum", "none"] = "sum") -> Tensor:
    """The cross-entropy in nats of labels [...] under logits [..., classes], in fp32 or above; −100 counts nothing.

    Args:
        logits: any floating dtype; the labels may be on another device.
        labels: class numbers.
        reduction: "sum" is a scalar, with a gradient even where every label is −100; "none" is [...].
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = labels.flatten().to(logits.device)
    losses = F.cross_entropy(logits.flatten(0, -2), targets, ignore_index=IGNORE, reduction=reduction)
    return losses.view_as(labels) if reduction == "none" else losses


def share_of_mean(total: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
    """A sum of losses, divided by `count`, or by the number of labels that count where it is None."""
    count = (labels != IGNORE).sum() if count is None else count
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


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
        return cross_entropy(head(hidden), targets)

    slices = zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
    sums = [checkpoint(part, *piece, use_reentrant=False, preserve_rng_state=False) for piece in slices]
    return share_of_mean(torch.stack(sums).sum(), targets, num_items_in_batch)
