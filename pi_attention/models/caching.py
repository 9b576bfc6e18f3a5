"""The caches of `pi_attention.cache` behind transformers' cache interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache

from pi_attention.cache import KeyValueCache, LayerCache, StaticLayerCache
from pi_attention.cache.contract import going_on
from pi_attention.cache.fixed import FollowingLayerCache
from pi_attention.cache.near import NearSinks
from pi_attention.cache.starts import Once
from pi_attention.pattern import PiPattern
from pi_attention.segments import starts_of_batch


class StorageLayer(CacheLayerMixin):
    """A cache of one layer, `storage`, as a layer of a transformers `Cache`.

    transformers' models know no segments: the ids of the new tokens go in before `update`, by `new_ids`, and those of
    the keys come out after it, by `seen_ids`.
    """

    is_sliding = True
    supports_early_init = False

    def __init__(self, storage: LayerCache | StaticLayerCache) -> None:
        self.storage: Any = storage
        self.new_ids: Tensor | None = None
        self.seen_ids: Tensor | None = None
        self.near: NearSinks | None = None  # see PiCache.keep_sinks_near

    @property
    def keys(self) -> Tensor | None:
        return self.storage.keys

    @property
    def values(self) -> Tensor | None:
        return self.storage.values

    @property
    def is_initialized(self) -> bool:
        return self.keys is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first update allocates."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new_ids, self.new_ids = self.new_ids, None
        keys, values, self.seen_ids = self.storage.extend(key_states, value_states, new_ids)
        return keys, values

    def reset(self) -> None:
        self.storage.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.storage.reorder(beam_idx)


class PiCacheLayer(StorageLayer):
    """A `LayerCache`, which grows and can be cut."""

    is_croppable = True

    def __init__(self, pattern: PiPattern, once: Once | None = None) -> None:
        super().__init__(LayerCache(pattern, once))

    @property
    def record_past(self) -> bool:
        return self.storage.recording

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = 0 if self.keys is None else self.keys.shape[2]
        return kept + query_length, self.storage.length - kept

    def get_seq_length(self) -> int:
        return self.storage.length

    def get_max_length(self) -> int:
        return -1

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            self.storage.reorder(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.keys is not None:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.storage.reorder(rows[torch.as_tensor(indices).to(rows.device)])

    def activate_past_recording(self) -> None:
        self.storage.record()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last −`tokens_to_remove` tokens, all of them where there are fewer; as transformers' layers.

        Raises:
            ValueError: the number is positive.
            RuntimeError: tokens that the pattern sees from there are gone, because nothing was recorded.
        """
        tokens = self.check_crop(tokens_to_remove)
        if tokens and self.is_initialized:
            self.storage.crop(tokens)

    def check_crop(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` would forget; it raises what that would."""
        tokens = -int(tokens_to_remove)  # a tensor from transformers 5.17
        if tokens < 0:
            raise ValueError(
                f"crop({-tokens}) is not supported: a negative number, such as {tokens}, removes so many tokens."
            )
        tokens = min(tokens, self.storage.length)
        try:
            self.storage.check_crop(tokens)
        except ValueError as error:
            raise RuntimeError(f"{error} Here: activate_past_recording().") from error
        return tokens

    def offload(self) -> None:
        self.storage.to("cpu")

    def prefetch(self) -> None:
        raise NotImplementedError(
            "offloading is not supported for PiCache: its memory is bounded, keep it on the device."
        )


class PiStaticLayer(StorageLayer):
    """A `StaticLayerCache`, whose tensors keep size and address."""

    is_compileable = True

    def __init__(self, storage: StaticLayerCache) -> None:
        super().__init__(storage)
        self.max_cache_len = storage.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # the pattern makes the mask

    def get_seq_length(self) -> Any:
        return 0 if self.storage.is_empty else self.storage.length

    def get_max_length(self) -> int:
        return self.max_cache_len


class BoundedCache:
    """What our models ask of the caches of all their layers."""

    layers: list[Any]
    get_seq_length: Any
    moves_sinks: bool
    """Whether its layers say, as `near`, how sinks move along with the text: see `PiCache.keep_sinks_near`."""

    def storage(self, layer: int) -> KeyValueCache:
        """The cache of a layer."""
        return self.layers[layer].storage

    def segments(
        self,
        segment_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        shape: tuple[int, int],
    ) -> Tensor | None:
        """Segments of the new tokens [B, T], each the position of its start, of what the caller of a model passes.

        Args:
            segment_ids: [B, cached + T], or None to derive them from the others.
            attention_mask, position_ids: see `segments_of_batch`.
            shape: B, T.

        Returns:
            None where each row goes on with its last segment.

        Raises:
            ValueError: segment_ids or the mask are of another length.
        """
        past = self.get_seq_length()
        if segment_ids is not None and segment_ids.shape[1] != past + shape[1]:
            raise ValueError(
                f"segment_ids {tuple(segment_ids.shape)} must be [B, {past + shape[1]}]: one id for each key token, "
                f"the {past} cached ones included."
            )
        starts = starts_of_batch(segment_ids, attention_mask, position_ids, past, *shape)
        return starts[:, past:] if starts is not None and past else starts  # the same object, known as starts

    def tell(self, segment_ids: Tensor | None) -> None:
        """Before new tokens of a model that knows no segments: what `segments` gave."""
        for layer in self.layers:
            layer.new_ids = segment_ids

    def library_mask(self, attention_mask: Tensor | None, like: Tensor) -> Tensor | None:
        """The mask that a model of transformers may see, of the one that its caller passed; `like` is [B, T, ...]."""
        return attention_mask

    @property
    def nbytes(self) -> int:
        """Bytes allocated in all layers."""
        return sum(layer.storage.nbytes for layer in self.layers)


def need_patterns(patterns: Any) -> None:
    """Raise TypeError for what is no list of patterns, such as a configuration."""
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, PiPattern) for pattern in patterns):
        raise TypeError(
            f"patterns must be a list, one PiPattern a layer, got {type(patterns).__name__}: pass config.patterns()."
        )


class PiCache(BoundedCache, DynamicCache):
    """The decoding cache of a model: for each layer what its pattern can still see.

    A `DynamicCache` for whoever asks; only its layers are other ones.

    Args:
        patterns: of the layers, `config.patterns()`.

    Raises:
        TypeError: patterns is something else, such as the configuration.
    """

    moves_sinks = True

    def __init__(self, patterns: list[PiPattern]) -> None:
        need_patterns(patterns)
        alike = {pattern: Once() for pattern in patterns}
        Cache.__init__(self, layers=[PiCacheLayer(pattern, alike[pattern]) for pattern in patterns])

    @property
    def is_initialized(self) -> bool:
        """Whether every layer holds keys."""
        return all(layer.is_initialized for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """As of transformers' caches; where a layer refuses, all layers stay as they are."""
        tokens_to_remove = int(tokens_to_remove)  # once: a tensor on a GPU waits for it
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def keep_sinks_near(self, near: list[NearSinks | None]) -> None:
        """Let sinks move along with the text, as a converted model does: see `NearSinks` for why, and how.

        Args:
            near: how those of each layer move; None where they stay.
        """
        for layer, of_layer in zip(self.layers, near, strict=True):
            layer.near = of_layer


class PiStaticCache(BoundedCache, StaticCache):
    """The decoding cache of a model for torch.compile: every tensor keeps its size and its address.

    A `StaticCache` for whoever asks; only its layers are other ones.

    Args:
        patterns: of the layers, `config.patterns()`.
        max_cache_len: tokens that will come at most; beyond them the oldest are forgotten, seen or not.

    Raises:
        TypeError: patterns is something else, such as the configuration.
    """

    moves_sinks = False

    def __init__(self, patterns: list[PiPattern], max_cache_len: int) -> None:
        need_patterns(patterns)
        first: dict[PiPattern, StaticLayerCache] = {}
        storages: list[StaticLayerCache] = []
        for pattern in patterns:
            known = first.get(pattern)
            storages.append(StaticLayerCache(pattern, max_cache_len) if known is None else FollowingLayerCache(known))
            first.setdefault(pattern, storages[-1])
        Cache.__init__(self, layers=[PiStaticLayer(storage) for storage in storages])

    @property
    def is_empty(self) -> bool:
        """Whether no token has come since the cache was made or reset."""
        return self.layers[0].storage.is_empty

    def segments(
        self,
        segment_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        shape: tuple[int, int],
    ) -> Tensor | None:
        """See `BoundedCache.segments`; later tokens go on, until a position id is 0 or does not go on by one.

        The last T entries of attention_mask are those of the new tokens; of the others the cache knows.
        """
        if self.is_empty:
            return super().segments(segment_ids, attention_mask, position_ids, shape)
        if segment_ids is not None:
            raise ValueError(
                "a static cache takes segment_ids with the first tokens only: later ones pass position_ids."
            )
        return self._later_segments(attention_mask, position_ids, shape[1])

    def library_mask(self, attention_mask: Tensor | None, like: Tensor) -> Tensor | None:
        """See `BoundedCache.library_mask`; of four dimensions, so that transformers makes none for its own caches."""
        return like.new_ones(len(like), 1, 1, 1)

    def _later_segments(self, attention_mask: Tensor | None, position_ids: Tensor | None, tokens: int) -> Tensor:
        storage = self.layers[0].storage
        length, new = storage.length.to(torch.int32), going_on(storage.ids, storage.length, tokens)
        starts_here = torch.zeros_like(new, dtype=torch.bool)
        if position_ids is not None:
            starts_here |= torch.cat([position_ids[:, :1] == 0, position_ids[:, 1:] != position_ids[:, :-1] + 1], dim=1)
        present = None if attention_mask is None else attention_mask[:, -tokens:] != 0
        if present is not None and tokens > 1:  # a segment ends where padding begins
            starts_here[:, 1:] |= present[:, 1:] & ~present[:, :-1]
        position = length + torch.arange(tokens, device=new.device, dtype=torch.int32)
        start = torch.where(starts_here, position, -1).cummax(dim=1).values
        new = torch.where(start < 0, new, start)
        return new if present is None else torch.where(present, new, -1)
