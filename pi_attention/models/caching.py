"""Our bounded layer cache behind transformers' cache interface, and transformers' caches behind that of our layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from pi_attention.cache import LayerCache
from pi_attention.models.continuous import REFUSAL
from pi_attention.models.near_sinks import NearSinks, sinks_among
from pi_attention.models.static_cache import PiStaticCache, PiStaticLayer
from pi_attention.nn.rope import moved_rotary
from pi_attention.pattern import PiPattern
from pi_attention.segments import segment_starts


class PiCacheLayer(CacheLayerMixin):
    """A `LayerCache` as a layer of a transformers `Cache`."""

    is_sliding = True
    is_croppable = True
    supports_early_init = False

    def __init__(self, pattern: PiPattern) -> None:
        self.cache = LayerCache(pattern)
        self.starts: Tensor | None = None  # where the segments of the next tokens begin, unless `update` is told
        self.near: NearSinks | None = None  # see PiCache.keep_sinks_near

    @property
    def keys(self) -> Tensor | None:
        return None if self.cache.kept is None else self.cache.kept[0]

    @property
    def values(self) -> Tensor | None:
        return None if self.cache.kept is None else self.cache.kept[1]

    @property
    def is_initialized(self) -> bool:
        return self.cache.kept is not None

    @property
    def record_past(self) -> bool:
        return self.cache.recording

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first update allocates."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, starts: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        starts = self.starts if starts is None else starts
        key, value = self.cache.update(key_states, value_states, starts)
        if self.near is None or self.cache.length <= self.near.most or key_states.shape[2] > 1:
            return key, value  # with several queries, each has sinks of its own: see NearSinks
        frequencies = self.near.frequencies
        start = torch.zeros(1, dtype=torch.long, device=key.device) if starts is None else starts
        by = self.near.shift(torch.tensor(self.cache.length - 1, device=key.device), start)[:, None]
        sinks = sinks_among(self.positions(), start[:, None], self.cache.pattern)
        if starts is None:  # then they come first, and the rest need not be turned
            slots = self.cache.pattern.sinks
            by = torch.where(sinks[:, :slots], by, 0)
            return torch.cat([moved_rotary(key[:, :, :slots], by, frequencies), key[:, :, slots:]], dim=2), value
        return moved_rotary(key, torch.where(sinks, by, 0), frequencies), value

    def positions(self) -> Tensor:
        """Of the keys last returned, [B, keys]; −1 for an empty sink slot."""
        assert self.keys is not None
        every = torch.arange(self.cache.length, device=self.keys.device)
        return self.cache.select(every.expand(self.keys.shape[0], -1))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = 0 if self.keys is None else self.keys.shape[2]
        return kept + query_length, self.cache.length - kept

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.cache.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            self.cache.reorder(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.keys is not None:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.cache.reorder(rows[torch.as_tensor(indices).to(rows.device)])

    def activate_past_recording(self) -> None:
        self.cache.record()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last −`tokens_to_remove` tokens, all of them where there are fewer; as transformers' layers.

        Raises:
            ValueError: the number is positive.
            RuntimeError: tokens that the pattern sees from there are gone, because nothing was recorded.
        """
        tokens = -int(tokens_to_remove)  # a tensor from transformers 5.17
        if tokens < 0:
            raise ValueError(
                f"crop({-tokens}) is not supported: a negative number, such as {tokens}, removes so many tokens."
            )
        if tokens >= self.cache.length:
            if tokens and self.is_initialized:
                self.cache.reset()
            return
        try:
            self.cache.crop(tokens)
        except ValueError as error:
            raise RuntimeError(f"{error} Here: activate_past_recording().") from error

    def offload(self) -> None:
        self.cache.to("cpu")

    def prefetch(self) -> None:
        raise NotImplementedError(
            "offloading is not supported for PiCache: its memory is bounded, keep it on the device."
        )


class PiCache(DynamicCache):
    """The decoding cache of a model: for each layer what its pattern can still see.

    A `DynamicCache` for whoever asks; only its layers are other ones.

    Args:
        patterns: of the layers, `config.patterns()`.
    """

    def __init__(self, patterns: list[PiPattern]) -> None:
        Cache.__init__(self, layers=[PiCacheLayer(pattern) for pattern in patterns])

    @property
    def is_initialized(self) -> bool:
        """Whether every layer holds keys."""
        return all(layer.is_initialized for layer in self.layers)

    def begin(self, segment_ids: Tensor | None) -> None:
        """Before new tokens of a model that knows no segments: the ids [B, length + T], which place the sinks."""
        starts = None
        if segment_ids is not None and any(layer.cache.pattern.sinks for layer in self.layers):
            starts = segment_starts(segment_ids)[:, self.get_seq_length()]
        for layer in self.layers:
            layer.starts = starts if layer.cache.pattern.sinks else None

    def keep_sinks_near(self, most: int, frequencies: list[Tensor | None]) -> None:
        """Let sinks move along, so that none is `most` tokens or more before the newest token.

        See `NearSinks` for why, and for several queries at once.

        Args:
            most: tokens, the context of the pretrained model.
            frequencies: of each layer's rotary embedding, [rotated features / 2]; None for a layer without one.
        """
        for layer, of_layer in zip(self.layers, frequencies, strict=True):
            if layer.cache.pattern.sinks and of_layer is not None:
                layer.near = NearSinks(most, of_layer)

    @property
    def nbytes(self) -> int:
        """Bytes allocated in all layers."""
        return sum(layer.cache.nbytes for layer in self.layers)


class BoundedGeneration:
    """Before GenerationMixin: `generate` makes our caches where transformers would make a dynamic or a static one."""

    config: Any

    def new_cache(self) -> PiCache:
        """An empty decoding cache of bounded memory for this model."""
        return PiCache(self.config.patterns())

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        """Refused: paged caches hold blocks of consecutive keys, and ours keeps what the pattern sees."""
        raise NotImplementedError(REFUSAL)

    def _prepare_static_cache(
        self, cache_implementation: str, batch_size: int, max_cache_len: int, *args: Any, **kwargs: Any
    ) -> PiStaticCache:
        if "offloaded" in cache_implementation:
            raise NotImplementedError(
                f"cache_implementation={cache_implementation!r}: a cache is bounded, keep it on the device ('static')."
            )
        # as large as any before, because another size would compile again
        self._previous_max_cache_length = max(max_cache_len, getattr(self, "_previous_max_cache_length", -1))
        return PiStaticCache(self.config.patterns(), self._previous_max_cache_length)

    @staticmethod
    def create_masks_for_generate(
        inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor | None:
        """The padding mask of the new tokens [B, T]: a static cache knows that of the others."""
        if attention_mask is None:
            return None
        new = attention_mask[:, -inputs_embeds.shape[1] :]
        return new.clone(memory_format=torch.contiguous_format)  # the stride of a view would change, and recompile

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        if given is None and generation_config.cache_implementation == "offloaded":
            raise NotImplementedError(
                "cache_implementation='offloaded': a cache is bounded, keep it on the device (leave the option out)."
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if given is None and type(model_kwargs.get("past_key_values")) is DynamicCache:
            model_kwargs["past_key_values"] = self.new_cache()
            if getattr(generation_config, "is_assistant", False):
                model_kwargs["past_key_values"].activate_past_recording()


class LayerOfCache:
    """One layer of any transformers cache, as `nn.PiAttention` wants it."""

    def __init__(self, cache: Cache, layer_idx: int) -> None:
        self._cache, self._layer_idx = cache, layer_idx
        self.length: int = cache.get_seq_length(layer_idx)

    def extend(
        self, key: Tensor, value: Tensor, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append; all keys and values that the new queries may see, and the segment ids of these keys."""
        layer = self._cache.layers[self._layer_idx] if self._layer_idx < len(self._cache.layers) else None
        if isinstance(layer, PiCacheLayer):
            return layer.cache.extend(key, value, segment_ids)
        if isinstance(layer, PiStaticLayer):
            return layer.extend(key, value, segment_ids)
        key, value = self._cache.update(key, value, self._layer_idx)
        return key, value, None if segment_ids is None else segment_ids[:, segment_ids.shape[1] - key.shape[2] :]

    def resume(self, key: Tensor, value: Tensor, length: int) -> None:
        """As if `length` tokens had been seen, of which these keys and values are the ones to keep."""
        if not isinstance(self._cache, PiCache):
            raise ValueError(
                f"past_key_values is a {type(self._cache).__name__}: a sharded sequence fills a PiCache only; "
                "pass model.new_cache() or use_cache=False."
            )
        self._cache.layers[self._layer_idx].cache.resume(key, value, length)
