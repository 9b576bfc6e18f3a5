"""A decoding cache in tensors of fixed size, for `generate(cache_implementation="static")` and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache

from pi_attention.pattern import PiPattern
from pi_attention.segments import segment_starts


class PiStaticLayer(CacheLayerMixin):
    """Sinks, then the last tokens up to the newest; slots that are empty have a segment id of −1.

    A step moves every key by one slot: twice the bytes of the cache, for an address that never changes.

    Args:
        pattern: of the layer; it decides what is kept.
        max_cache_len: tokens that will come at most; beyond them the oldest are forgotten, seen or not.
    """

    is_compileable = True
    is_sliding = True
    supports_early_init = False

    def __init__(self, pattern: PiPattern, max_cache_len: int) -> None:
        super().__init__()
        self.pattern = pattern
        reach = max_cache_len if pattern.reach is None else pattern.reach + 1
        self.sinks = min(pattern.sinks, max(0, max_cache_len - reach))  # the others are never forgotten
        self.max_cache_len = max_cache_len
        self.slots = self.sinks + min(reach, max_cache_len)
        self.ids: Tensor | None = None  # [B, slots] int32
        self.length = torch.tensor(0)
        self.is_empty = True
        self.new_ids: Tensor | None = None  # [B, T] of the tokens that the next `update` brings
        self.seen_ids: Tensor | None = None  # [B, keys] of the keys last returned

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for a batch as this one."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        self.keys = key_states.new_zeros(batch, heads, self.slots, key_states.shape[-1])
        self.values = value_states.new_zeros(batch, heads, self.slots, value_states.shape[-1])
        self.ids = torch.full((batch, self.slots), -1, dtype=torch.int32, device=self.device)
        self.length = self.length.to(self.device)
        for tensor in (self.keys, self.values, self.ids, self.length):
            torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`extend` for models of transformers: the segment ids come by `new_ids` and go by `seen_ids`."""
        keys, values, self.seen_ids = self.extend(key_states, value_states, self.new_ids)
        return keys, values

    def extend(self, key: Tensor, value: Tensor, segment_ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Append T new tokens with ids [B, T]; all that their queries can see: keys, values and their segment ids."""
        first = self.is_empty
        self._leave_inference_mode()
        if first:
            if self.ids is None or len(self.ids) != len(key):
                self.lazy_initialization(key, value)
            self.is_empty = False
        assert self.ids is not None
        tokens = key.shape[2]
        new = torch.zeros_like(self.ids[:, :1]).expand(-1, tokens) if segment_ids is None else segment_ids
        new = new.expand(len(self.ids), -1).to(torch.int32)
        ids = torch.cat([self.ids, new], dim=1)
        keys = torch.cat([self.keys, key], dim=2)
        values = torch.cat([self.values, value], dim=2)
        self.length.add_(tokens)
        kept = self._kept(ids, tokens)
        self.ids.copy_(_take(ids, kept, 1).masked_fill(kept < 0, -1))
        self.keys.copy_(_take(keys, kept[:, None, :, None], 2))
        self.values.copy_(_take(values, kept[:, None, :, None], 2))
        if tokens == 1:
            return self.keys, self.values, self.ids
        return (key, value, new) if first else (keys, values, ids)

    def _leave_inference_mode(self) -> None:
        """Copy tensors that inference mode made, where it is left: they cannot be written to there."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or self.ids is None:
            return
        if self.ids.is_inference():
            assert self.keys is not None and self.values is not None
            self.keys, self.values, self.ids = self.keys.clone(), self.values.clone(), self.ids.clone()
            for tensor in (self.keys, self.values, self.ids):
                torch._dynamo.mark_static_address(tensor)
        if self.length.is_inference():
            self.length = self.length.clone()
            torch._dynamo.mark_static_address(self.length)

    def _kept(self, ids: Tensor, tokens: int) -> Tensor:
        """Which of the old slots and new tokens fill the slots now, [B, slots]; −1 for none."""
        last = torch.arange(tokens + self.sinks, ids.shape[1], device=ids.device).expand(len(ids), -1)
        if not self.sinks:
            return last
        leaving = ids[:, : self.sinks + tokens]
        current = ids[:, -1:]  # the segment whose sinks are wanted
        rank = ((leaving == current) & (current >= 0)).cumsum(dim=1)
        filled = rank[:, -1:].clamp(max=self.sinks)
        number = torch.arange(self.sinks, device=ids.device) - (self.sinks - filled)  # which sink a slot holds
        found = torch.searchsorted(rank, number.clamp(min=0) + 1).clamp(max=leaving.shape[1] - 1)
        return torch.cat([torch.where(number < 0, -1, found), last], dim=1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # the pattern makes the mask

    def get_seq_length(self) -> Any:
        return 0 if self.is_empty else self.length

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        self._leave_inference_mode()
        self.is_empty = True
        self.length.zero_()
        if self.ids is not None:
            self.ids.fill_(-1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._leave_inference_mode()
        if self.ids is not None and self.keys is not None and self.values is not None:
            index = beam_idx.to(self.device)
            for tensor in (self.keys, self.values, self.ids):
                tensor.copy_(tensor.index_select(0, index))


def _take(source: Tensor, index: Tensor, dim: int) -> Tensor:
    shape = list(source.shape)
    shape[dim] = index.shape[dim]
    return source.gather(dim, index.clamp(min=0).expand(shape))


class PiStaticCache(StaticCache):
    """The decoding cache of a model for torch.compile: every tensor keeps its size and its address.

    A `StaticCache` for whoever asks; only its layers are other ones.

    Args:
        patterns: of the layers, `config.patterns()`.
        max_cache_len: tokens that will come at most; beyond them the oldest are forgotten, seen or not.
    """

    layers: list[PiStaticLayer]

    def __init__(self, patterns: list[PiPattern], max_cache_len: int) -> None:
        Cache.__init__(self, layers=[PiStaticLayer(pattern, max_cache_len) for pattern in patterns])

    @property
    def is_empty(self) -> bool:
        """Whether no token has come since the cache was made or reset."""
        return self.layers[0].is_empty

    def begin(self, segment_ids: Tensor | None) -> Tensor | None:
        """Before the first T tokens: their segment ids [B, T], as the cache writes them; None for one segment."""
        new = None if segment_ids is None else segment_starts(segment_ids)  # no two segments have the same
        return self._tell(new)

    def go_on(self, attention_mask: Tensor | None, position_ids: Tensor | None, tokens: int) -> Tensor | None:
        """Before T later tokens: they continue the last segment, until a position id that does not go on by one.

        Args:
            attention_mask: [B, T] or longer; its last T entries are 0 for padding.
            position_ids: [B or 1, T]; 0 at the first token, or a jump later, starts a new segment.
            tokens: T.
        """
        ids = self.layers[0].ids
        assert ids is not None
        most = ids.amax(dim=1, keepdim=True)
        new = torch.where(ids[:, -1:] >= 0, ids[:, -1:], most + 1).expand(-1, tokens)
        if position_ids is not None:
            jumps = position_ids[:, 1:] != position_ids[:, :-1] + 1
            documents = torch.cat([position_ids[:, :1] == 0, jumps], dim=1).cumsum(dim=1, dtype=torch.int32)
            new = torch.where(documents > 0, most.clamp(min=0) + documents, new)
        if attention_mask is not None:
            new = torch.where(attention_mask[:, -tokens:] != 0, new, -1)
        return self._tell(new)

    def _tell(self, new: Tensor | None) -> Tensor | None:
        for layer in self.layers:
            layer.new_ids = new
        return new
