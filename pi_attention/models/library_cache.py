"""transformers' own caches behind the contract of ours, for models without sinks."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache

from pi_attention.cache import KeyValueCache
from pi_attention.models.caching import BoundedCache
from pi_attention.segments import segments_of_batch


class LibraryCache:
    """A dynamic cache of transformers for one forward pass of a model; like a `BoundedCache`."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._ids: Tensor | None = None

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self._cache.get_seq_length()

    def segments(
        self,
        segment_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        shape: tuple[int, int],
    ) -> Tensor | None:
        """See `BoundedCache.segments`; the cache itself keeps none, so all of them are kept here."""
        if segment_ids is None:
            segment_ids = segments_of_batch(attention_mask, position_ids, self.get_seq_length(), *shape)
        self._ids = segment_ids
        return segment_ids

    def storage(self, layer: int) -> KeyValueCache:
        """The cache of a layer."""
        return LibraryLayer(self._cache, layer, self._ids)


class LibraryLayer:
    """One layer of a dynamic cache of transformers; a `KeyValueCache`.

    Args:
        cache: of the model.
        layer: its index.
        segment_ids: [B, S] of all tokens, the new ones included.
    """

    def __init__(self, cache: Cache, layer: int, segment_ids: Tensor | None) -> None:
        self._cache, self._layer, self._ids = cache, layer, segment_ids
        self.length: int = cache.get_seq_length(layer)

    def extend(
        self, key: Tensor, value: Tensor, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `KeyValueCache.extend`; the last tokens are kept, as many as the cache sees fit."""
        key, value = self._cache.update(key, value, self._layer)
        return key, value, None if self._ids is None else self._ids[:, self._ids.shape[1] - key.shape[2] :]

    def resume(self, key: Tensor, value: Tensor, length: int) -> None:
        """Refused: see `LayerCache.resume`."""
        raise ValueError(
            f"past_key_values is a {type(self._cache).__name__}: a sharded sequence fills a PiCache only; "
            "pass model.new_cache() or use_cache=False."
        )


def known_cache(cache: Cache, sinks: int) -> BoundedCache | LibraryCache:
    """A cache that a caller passed, as our models use it.

    Raises:
        ValueError: it forgets what the model needs, the attention sinks, or does not put the new keys at the end.
    """
    if isinstance(cache, BoundedCache):
        return cache
    if sinks or cache.is_compileable:
        fault = f"forgets the attention sinks (sinks={sinks})" if sinks else "does not put the new keys at the end"
        raise ValueError(
            f"a {type(cache).__name__} {fault}: leave past_key_values out, or pass PiCache(config.patterns())."
        )
    return LibraryCache(cache)
