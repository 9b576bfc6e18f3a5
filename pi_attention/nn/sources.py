"""Where a layer's keys come from: this call and a cache, or (in `pi_attention.distributed`) a sharded sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from pi_attention.cache.contract import KeyValueCache, RaggedKeys

Operator = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""Output [B, H, T, D] of query, key, value, gate logits and segment ids of the keys; the queries are the last ones."""


class KeySource(Protocol):
    """What a layer asks for attention: the one place that knows where keys beside the new ones lie."""

    def check_batch(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Raise ValueError where a model is given a batch whose keys cannot be found; any will do here."""
        return

    def position(self, cache: KeyValueCache | None = None) -> int | Tensor:
        """Position of the first new token."""
        ...

    def attend(
        self,
        operator: Operator,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None,
        segment_ids: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        once: bool = False,
    ) -> Tensor:
        """The operator for the new queries over all keys that they see, [B, H, T, D].

        Args:
            operator: of the layer.
            query: [B, H, T, D], after rotary embedding, like key.
            key: [B, G, T, D] of the new tokens, like value.
            value: like key.
            gate: logits [B, H, T], or None.
            segment_ids: of the tokens so far; see `pi_attention` and `KeyValueCache.extend`.
            cache: holds earlier keys, and gets the new ones.
            once: call the operator once only, with all queries.
        """
        ...


class NewKeys(KeySource):
    """The keys of this call, and of the cache if there is one; a `KeySource`."""

    def position(self, cache: KeyValueCache | None = None) -> int | Tensor:
        """Position of the first new token."""
        return 0 if cache is None else cache.length

    def attend(
        self,
        operator: Operator,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None,
        segment_ids: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        once: bool = False,
    ) -> Tensor:
        """See `KeySource.attend`."""
        if cache is not None:
            key, value, segment_ids = cache.extend(key, value, segment_ids)
        if isinstance(cache, RaggedKeys):
            return cache.attend(operator, query, key, value, gate)
        return operator(query, key, value, gate, segment_ids)
