"""A decoding cache whose tensors keep their size and address, for torch.compile and CUDA graphs.

Sinks, then the last tokens up to the newest. A step moves every key by one slot: twice the bytes of the cache, for an
address that never changes. Segment ids of −1 mark the empty slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pi_attention.cache.contract import sink_places, starts_of_new, take
from pi_attention.cache.held import Held, held
from pi_attention.pattern import PiPattern, need_int, need_pattern


class StaticLayerCache:
    """Keys and values that later queries of one layer can see, in tensors of fixed size; a `KeyValueCache`.

    Args:
        pattern: of the layer; it decides what is kept.
        max_length: tokens that will come at most; beyond them the oldest are forgotten, seen or not.

    Raises:
        TypeError, ValueError: no pattern, a bidirectional one, or no positive length.
    """

    def __init__(self, pattern: PiPattern, max_length: int) -> None:
        need_pattern(pattern)
        if not pattern.causal:
            raise ValueError("a decoding cache needs a causal pattern: with causal=False every token sees later ones.")
        need_int("max_length", max_length, 1, "tokens that will come at most")
        self.pattern, self.max_length = pattern, max_length
        reach = max_length if pattern.reach is None else pattern.reach + 1
        self.sinks = min(pattern.sinks, max(0, max_length - reach))  # the others are never forgotten
        self.slots = self.sinks + min(reach, max_length)
        self.keys: Tensor | None = None  # [B, G, slots, D]
        self.values: Tensor | None = None
        self.ids: Tensor | None = None  # [B, slots] int32
        self.length = torch.tensor(0)
        self.is_empty = True

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        held = (self.keys, self.values, self.ids)
        return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)

    def extend(self, key: Tensor, value: Tensor, segment_ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Append, as `KeyValueCache.extend` says; the segment ids returned are −1 for empty slots."""
        first = self.is_empty
        self._leave_inference_mode()
        if first:
            if not self._fits(key):
                self._allocate(key, value)
            self.is_empty = False
        assert self.keys is not None and self.values is not None and self.ids is not None
        new = self._new_ids(segment_ids, key.shape[2], first)
        ids = torch.cat([self.ids, new], dim=1)
        keys = torch.cat([self.keys, key], dim=2)
        values = torch.cat([self.values, value], dim=2)
        self.length.add_(key.shape[2])
        kept = self._kept(ids, key.shape[2])
        self.ids.copy_(take(ids, kept, 1).masked_fill(kept < 0, -1))
        self.keys.copy_(take(keys, kept[:, None, :, None], 2))
        self.values.copy_(take(values, kept[:, None, :, None], 2))
        if key.shape[2] == 1:
            return self.keys, self.values, self.ids
        return (key, value, new) if first else (keys, values, ids)

    def resume(self, key: Tensor, value: Tensor, length: int) -> None:
        """Refused: see `LayerCache.resume`."""
        raise ValueError("a sharded sequence fills a growing cache only: pass model.new_cache() or use_cache=False.")

    def held(self) -> Held:
        """What later tokens can see, copied.

        Raises:
            ValueError: no token has come, or more than max_length.
        """
        length = int(self.length)
        if self.keys is None or self.values is None or self.ids is None or self.is_empty:
            raise ValueError("the cache is empty: let it see tokens first.")
        if length > self.max_length:
            raise ValueError(f"the cache has seen {length} tokens, more than its max_length={self.max_length}.")
        room = self.pattern.sinks  # a short cache has slots for fewer
        states = F.pad(torch.stack([self.keys, self.values]), (0, 0, room, 0))
        return held(states, F.pad(self.ids, (room, 0), value=-1), length, self.pattern)

    def hold(self, what: Held) -> None:
        """Go on from what another cache of this pattern held, in place of what is here.

        Raises:
            ValueError: it has seen as many tokens as max_length, or more.
        """
        if what.length >= self.max_length:
            raise ValueError(
                f"max_length={self.max_length} leaves no room beside the {what.length} tokens seen: set a larger one."
            )
        self.reset()
        keys, values = what.states
        if not self._fits(keys):
            self._allocate(keys, values)
        assert self.keys is not None and self.values is not None and self.ids is not None
        slots = min(self.slots, what.starts.shape[1])  # those left out are empty
        for mine, theirs in ((self.keys, keys), (self.values, values)):
            mine[:, :, self.slots - slots :] = theirs[:, :, theirs.shape[2] - slots :]
        self.ids[:, self.slots - slots :] = what.starts[:, what.starts.shape[1] - slots :]
        self.length.fill_(what.length)
        self.is_empty = False

    def reset(self) -> None:
        """Forget everything, and keep the tensors."""
        self._leave_inference_mode()
        self.is_empty = True
        self.length.zero_()
        if self.ids is not None:
            self.ids.fill_(-1)

    def reorder(self, index: Tensor) -> None:
        """Take the rows of the batch by `index` [B], as beam search chooses them."""
        self._leave_inference_mode()
        for tensor in (self.keys, self.values, self.ids):
            if tensor is not None:
                tensor.copy_(tensor.index_select(0, index.to(tensor.device)))

    def _fits(self, key: Tensor) -> bool:
        """Whether the tensors of earlier sequences take keys of this batch, heads, features, dtype and device."""
        if self.keys is None:
            return False
        mine, shape = self.keys.shape, key.shape
        alike = (mine[0], mine[1], mine[3]) == (shape[0], shape[1], shape[3])
        return alike and (self.keys.dtype, self.keys.device) == (key.dtype, key.device)

    def _allocate(self, key: Tensor, value: Tensor) -> None:
        batch, heads = key.shape[:2]
        self.keys = key.new_zeros(batch, heads, self.slots, key.shape[-1])
        self.values = value.new_zeros(batch, heads, self.slots, value.shape[-1])
        self.ids = torch.full((batch, self.slots), -1, dtype=torch.int32, device=key.device)
        self.length = self.length.to(key.device)
        self._fix_addresses()

    def _fix_addresses(self) -> None:
        for tensor in (self.keys, self.values, self.ids, self.length):
            torch._dynamo.mark_static_address(tensor)

    def _leave_inference_mode(self) -> None:
        """Copy tensors that inference mode made, where it is left: they cannot be written to there."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        names = [name for name in ("keys", "values", "ids", "length") if getattr(self, name) is not None]
        made_there = [name for name in names if getattr(self, name).is_inference()]
        for name in made_there:
            setattr(self, name, getattr(self, name).clone())
            torch._dynamo.mark_static_address(getattr(self, name))

    def _new_ids(self, segment_ids: Tensor | None, tokens: int, first: bool) -> Tensor:
        """Segment ids [B, T] of the new tokens; without any they go on with the last segment."""
        assert self.ids is not None
        if segment_ids is not None:
            new = starts_of_new(segment_ids, tokens, first).expand(len(self.ids), -1)
            return new.to(self.ids.device)  # of the layers of one model each may lie on a GPU of its own
        if first:
            return torch.zeros_like(self.ids[:, :1]).expand(-1, tokens)
        last = self.ids[:, -1:]
        return torch.where(last < 0, self.length.to(last.dtype), last).expand(-1, tokens)

    def _kept(self, ids: Tensor, tokens: int) -> Tensor:
        """Which of the old slots and new tokens fill the slots now, [B, slots]; −1 for none."""
        last = torch.arange(tokens + self.sinks, ids.shape[1], device=ids.device).expand(len(ids), -1)
        if not self.sinks:
            return last
        return torch.cat([sink_places(ids[:, : self.sinks + tokens], ids[:, -1:], self.sinks), last], dim=1)
