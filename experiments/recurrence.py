"""The loss of tokens by what stood before them: did their bigram occur earlier, how far away, and what followed there?

Most of what attention gains over a window is recall of such bigrams (Zoology, arXiv 2312.04927).
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrence(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token from the third on, where the two tokens before it last stood earlier in its row.

    Args:
        ids: token ids [N, T] below 2³¹.

    Returns:
        The distance to that occurrence, in tokens, [N, T − 2], 0 where there is none; and whether the same token
        followed there, bool [N, T − 2].
    """
    bigrams = ids[:, :-2] * 2**31 + ids[:, 1:-1]
    ordered, order = bigrams.sort(dim=1, stable=True)
    again = ordered[:, 1:] == ordered[:, :-1]
    distance = torch.zeros_like(bigrams).scatter_(1, order[:, 1:], (order[:, 1:] - order[:, :-1]) * again)
    place = torch.arange(bigrams.shape[1])
    followed = ids[:, 2:].gather(1, place - distance)
    return distance, (followed == ids[:, 2:]) & (distance > 0)


def by_recurrence(found: Tensor, ids: Tensor, keys: int) -> dict[str, list[float]]:
    """Mean loss and number of the tokens of each kind: of a new bigram, of one within `keys` tokens, or beyond.

    "Repeated" are those that followed the bigram there, too.

    Args:
        found: losses [N, T − 1] of predicting the tokens from the second on.
        ids: the blocks [N, T].
        keys: distance from which the occurrence lies beyond a window of so many keys.
    """
    distance, repeated = recurrence(ids)
    within = (distance > 0) & (distance < keys)
    beyond = distance >= keys
    kinds = {
        "new": distance == 0,
        "within": within,
        "within, repeated": within & repeated,
        "beyond": beyond,
        "beyond, repeated": beyond & repeated,
    }
    losses = found[:, 1:]
    return {
        kind: [round(float(losses[chosen].mean()), 4), int(chosen.sum())]
        for kind, chosen in kinds.items()
        if chosen.any()
    }
