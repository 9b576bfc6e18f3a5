"""Sinks that move along with the text: beyond the pretrained context each query sees them at the largest lag it knows.

A pretrained model knows no larger lag than its context. Window and skips stay below it, sinks would not (arXiv
2309.17453 gives sinks a position in the cache for the same reason). So a query at position p of its segment sees the
sinks as if they stood p + 1 − context positions later. Turning the key by +n is turning the query by −n; so all
queries of a chunk, each with its own n, take one call of the operator over twice the features: [q, turned q] against
[k, 0] for a usual key and [0, k] for a sink. A result then does not depend on how tokens are batched into calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pi_attention.nn.rope import moved_rotary
from pi_attention.pattern import PiPattern


@dataclass(frozen=True)
class NearSinks:
    """How far sinks may lie behind, and how they are turned.

    Args:
        most: tokens, the context of the pretrained model.
        frequencies: of the layer's rotary embedding, [rotated features / 2].
    """

    most: int
    frequencies: Tensor

    def shift(self, position: Tensor, start: Tensor | int) -> Tensor:
        """By how many positions the sinks move, for queries at these positions of segments that begin at `start`."""
        return (position + 1 - start - self.most).clamp(min=0)

    def attend(
        self,
        operator: Callable[[Tensor, Tensor, Tensor], Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        shift: Tensor,
        is_sink: Tensor,
    ) -> Tensor:
        """The operator's output [B, H, T, D], each query seeing the sinks moved by its own shift.

        Args:
            operator: output of query, key and value, whose scale does not depend on the number of features.
            query: [B, H, T, D], after rotary embedding; key, value: [B, G, S, D].
            shift: [B or 1, T].
            is_sink: [B or 1, n] bool, of the first n ≤ S keys; later ones are none.
        """
        known = is_sink.shape[1]
        if query.shape[2] == 1:  # then the keys themselves can be turned
            by = torch.where(is_sink, shift, 0)
            moved = moved_rotary(key[:, :, :known], by, self.frequencies)
            return operator(query, torch.cat([moved, key[:, :, known:]], dim=2), value)
        turned = moved_rotary(query, -shift, self.frequencies)
        sink = F.pad(is_sink, (0, key.shape[2] - known))[:, None, :, None]
        keys = torch.cat([key.masked_fill(sink, 0.0), key.masked_fill(~sink, 0.0)], dim=-1)
        both = torch.cat([query, turned], dim=-1)
        return operator(both, keys, F.pad(value, (0, value.shape[-1])))[..., : value.shape[-1]]


@dataclass(frozen=True)
class RaggedSinks:
    """Sinks that move along with the texts of many requests, which lie one behind another in a row.

    Args:
        near: how far they may lie behind.
        sinks: of a request, its first keys.
        position: [1, ΣT] of the queries, each in its own request.
    """

    near: NearSinks
    sinks: int
    position: Tensor

    def around(self, operator: Callable[..., Tensor], places: Tensor | slice, number: Tensor) -> Callable[..., Tensor]:
        """The operator for the queries at these places, each seeing the sinks moved by its own shift.

        Args:
            operator: output of query, key, value and whatever else.
            places: in the row.
            number: [1, S], which key of its request each key is.
        """
        is_sink, shift = number < self.sinks, self.near.shift(self.position[:, places], 0)

        def moved(query: Tensor, key: Tensor, value: Tensor, *more: Tensor | None) -> Tensor:
            return self.near.attend(lambda *keys: operator(*keys, *more), query, key, value, shift, is_sink)

        return moved

    def move(self, key: Tensor, places: Tensor | slice, first: Tensor) -> None:
        """Move the sinks of N requests with one query each, in place.

        Args:
            key: [N, G, S, D].
            places: of the queries in the row.
            first: [N], which of the S keys is the first of each request.
        """
        column = first[:, None] + torch.arange(self.sinks, device=key.device)
        by = self.near.shift(self.position[:, places], 0).T.expand_as(column)
        column = column.clamp(max=key.shape[2] - 1)  # where a request has fewer keys, its last one is a sink, too
        index = column[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        key.scatter_(2, index, moved_rotary(key.gather(2, index), by, self.near.frequencies))


def sinks_among(position: Tensor, start: Tensor | int, pattern: PiPattern) -> Tensor:
    """Which keys are sinks of their segment, bool: positions [B or 1, S]; starts like them, −1 for padding."""
    number = position - start
    return (number >= 0) & (number < pattern.sinks) & (start >= 0)
