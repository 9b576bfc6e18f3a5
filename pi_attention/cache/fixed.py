"""A decoding cache whose tensors keep their size and address, for torch.compile and CUDA graphs.

Sinks, then the last tokens up to the newest. A step moves every key by one slot: twice the bytes of the cache, for an
address that never changes. Segment ids of −1 mark the empty slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pi_attention.cache.contract import check_new, going_on, nbytes_of, sink_places, starts_of_new, take
from pi_attention.cache.held import Held, held
from pi_attention.pattern import PiPattern, need_int, need_pattern
from pi_attention.segments import as_starts, starts_of_last


class Slots:
    """Which tokens stand in the slots of a cache: the same in all layers of one pattern, which can share this.

    Args:
        pattern: of the layers; it decides what is kept.
        max_length: tokens that will come at most.
    """

    def __init__(self, pattern: PiPattern, max_length: int) -> None:
        reach = max_length if pattern.reach is None else pattern.reach + 1
        self.sinks = min(pattern.sinks, max(0, max_length - reach))  # the others are never forgotten
        self.count = self.sinks + min(reach, max_length)
        self.ids: Tensor | None = None  # [B, count] int32
        self.length = torch.tensor(0)
        self._starts: Tensor | None = None  # [B, count] `starts_of_last` of the ids, after one new token
        self._places: Tensor | None = None  # [B, count] of the slots and new tokens that fill the slots, with sinks
        self._seen: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return nbytes_of(self.ids, self._starts, self._places)

    def allocate(self, batch: int, device: torch.device) -> None:
        """Empty slots for so many rows, unless these are there."""
        if self.ids is not None and self.ids.shape[0] == batch and self.ids.device == device:
            return
        self.ids = torch.full((batch, self.count), -1, dtype=torch.int32, device=device)
        self._starts = torch.empty_like(self.ids)
        self._places = torch.zeros(batch, self.count, dtype=torch.int64, device=device) if self.sinks else None
        self.length = self.length.to(device)
        self._fix_addresses()

    def advance(self, segment_ids: Tensor | None, tokens: int, first: bool) -> None:
        """Let new tokens in, with the segment ids that `KeyValueCache.extend` takes; `first`: there were none."""
        assert self.ids is not None
        new = self._new_ids(segment_ids, tokens, first)
        ids = torch.cat([self.ids, new], dim=1)
        self.length.add_(tokens)
        if self._places is None:
            self.ids.copy_(ids[:, tokens:])
        else:
            last = torch.arange(tokens + self.sinks, ids.shape[1], device=ids.device).expand(len(ids), -1)
            sinks = sink_places(ids[:, : self.sinks + tokens], ids[:, -1:], self.sinks)
            places = torch.cat([sinks, last], dim=1)
            self.ids.copy_(take(ids, places, 1).masked_fill(places < 0, -1))
            self._places.copy_(places)
        self._seen = self._starts_of_last() if tokens == 1 else new if first else ids

    def seen(self, device: torch.device) -> Tensor:
        """Segment ids of the keys that the newest tokens see, [B, S]."""
        assert self._seen is not None
        if self._seen.device == device:
            return self._seen  # the same object, which the layers know as starts
        return self._seen.to(device)  # of the layers of one model each may lie on a GPU of its own

    def fill(self, states: Tensor, with_new: Tensor) -> None:
        """Move states [2, B, G, count, D] on; `with_new` [2, B, G, count + T, D] has the new ones behind them."""
        if self._places is None:
            states.copy_(with_new[:, :, :, with_new.shape[3] - self.count :])
        else:
            states.copy_(take(with_new, self._places.to(states.device)[None, :, None, :, None], 3))

    def hold(self, starts: Tensor, length: int) -> None:
        """The last tokens of another cache, whose segments start at `starts` [B, tokens]; the other slots are empty."""
        self.empty()
        self.allocate(len(starts), starts.device)
        assert self.ids is not None
        count = min(self.count, starts.shape[1])
        self.ids[:, self.count - count :] = starts[:, starts.shape[1] - count :]
        self.length.fill_(length)

    def empty(self) -> None:
        """Forget everything, and keep the tensors."""
        self.leave_inference_mode()
        self.length.zero_()
        if self.ids is not None:
            self.ids.fill_(-1)

    def reorder(self, index: Tensor) -> None:
        """Take the rows of the batch by `index` [B]."""
        self.leave_inference_mode()
        if self.ids is not None:
            self.ids.copy_(self.ids.index_select(0, index.to(self.ids.device)))

    def leave_inference_mode(self) -> None:
        """Copy tensors that inference mode made, where it is left."""
        if writable(self, "ids", "length", "_starts", "_places"):
            self._fix_addresses()

    def _fix_addresses(self) -> None:
        fix_addresses(self.ids, self.length, self._starts, self._places)
        if self._starts is not None:
            as_starts(self._starts, always=True)

    def _starts_of_last(self) -> Tensor:
        """Segment starts of the keys that one new token sees, for all layers, in a tensor that keeps its address."""
        assert self.ids is not None and self._starts is not None
        self._starts.copy_(starts_of_last(self.ids))
        return self._starts

    def _new_ids(self, segment_ids: Tensor | None, tokens: int, first: bool) -> Tensor:
        """Segment ids [B, T] of the new tokens; without any they go on with the last segment."""
        assert self.ids is not None
        if segment_ids is not None:
            new = starts_of_new(segment_ids, tokens, first).expand(len(self.ids), -1)
            return new.to(self.ids.device)
        if first:
            return torch.zeros_like(self.ids[:, :1]).expand(-1, tokens)
        return going_on(self.ids, self.length, tokens)


def fix_addresses(*tensors: Tensor | None) -> None:
    """Tell the compiler that these keep their addresses."""
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.mark_static_address(tensor)


def writable(owner: object, *names: str) -> bool:
    """Copy tensors that inference mode made, where it is left: they cannot be written to there. Whether there were any.

    Args:
        owner: has the tensors as attributes, None where there is none.
        names: of the attributes.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    made_there = [name for name in names if (found := getattr(owner, name)) is not None and found.is_inference()]
    for name in made_there:
        setattr(owner, name, getattr(owner, name).clone())
    return bool(made_there)


class StaticLayerCache:
    """Keys and values that later queries of one layer can see, in tensors of fixed size; a `KeyValueCache`.

    Args:
        pattern: of the layer; it decides what is kept.
        max_length: tokens that will come at most; beyond them the oldest are forgotten, seen or not.

    Raises:
        TypeError, ValueError: no pattern, a bidirectional one, or no positive length.
    """

    _leads = True
    """Whether the slots are this layer's own."""

    def __init__(self, pattern: PiPattern, max_length: int) -> None:
        need_pattern(pattern)
        if not pattern.causal:
            raise ValueError("a decoding cache needs a causal pattern: with causal=False every token sees later ones.")
        need_int("max_length", max_length, 1, "tokens that will come at most")
        self.pattern, self.max_length = pattern, max_length
        self._slots = Slots(pattern, max_length)
        self._states: Tensor | None = None  # [2, B, G, slots, D]: keys, values
        self.is_empty = True

    @property
    def keys(self) -> Tensor | None:
        """[B, G, slots, D]; None before the first tokens."""
        return None if self._states is None else self._states[0]

    @property
    def values(self) -> Tensor | None:
        """Like `keys`."""
        return None if self._states is None else self._states[1]

    @property
    def slots(self) -> int:
        """Keys of a row."""
        return self._slots.count

    @property
    def ids(self) -> Tensor | None:
        """Segment ids [B, slots] int32, −1 for empty slots; None before the first tokens."""
        return self._slots.ids

    @property
    def length(self) -> Tensor:
        """Tokens seen so far."""
        return self._slots.length

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return (self._slots.nbytes if self._leads else 0) + nbytes_of(self._states)

    def extend(self, key: Tensor, value: Tensor, segment_ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Append, as `KeyValueCache.extend` says; the segment ids returned are −1 for empty slots.

        Raises:
            ValueError: key and value do not have one shape [B, G, T, D], or another B, G or D than those kept.
        """
        first = self.is_empty
        check_new(key, value, None if first else self._states)
        self._leave_inference_mode()
        if first:
            self._allocate(key)
            if self._leads:
                self._slots.allocate(len(key), key.device)
            self.is_empty = False
        if self._leads:
            self._slots.advance(segment_ids, key.shape[2], first)
        assert self._states is not None
        states = torch.cat([self._states, torch.stack([key, value])], dim=3)
        self._slots.fill(self._states, states)
        seen = self._slots.seen(key.device)
        if first and key.shape[2] > 1:
            return key, value, seen
        keys, values = self._states if key.shape[2] == 1 else states
        return keys, values, seen

    def resume(self, key: Tensor, value: Tensor, length: int) -> None:
        """Refused: see `LayerCache.resume`."""
        raise ValueError("a sharded sequence fills a growing cache only: pass model.new_cache() or use_cache=False.")

    def held(self) -> Held:
        """What later tokens can see, copied.

        Raises:
            ValueError: no token has come, or more than max_length.
        """
        length = int(self.length)
        if self._states is None or self.ids is None or self.is_empty:
            raise ValueError("the cache is empty: let it see tokens first.")
        if length > self.max_length:
            raise ValueError(f"the cache has seen {length} tokens, more than its max_length={self.max_length}.")
        room = self.pattern.sinks  # a short cache has slots for fewer
        states = F.pad(self._states, (0, 0, room, 0))
        return held(states, F.pad(self.ids.to(states.device), (room, 0), value=-1), length, self.pattern)

    def hold(self, what: Held) -> None:
        """Go on from what another cache of this pattern held, in place of what is here.

        Raises:
            ValueError: it has seen as many tokens as max_length, or more.
        """
        if what.length >= self.max_length:
            raise ValueError(
                f"max_length={self.max_length} leaves no room beside the {what.length} tokens seen: set a larger one."
            )
        self._leave_inference_mode()
        self._allocate(what.states[0])
        assert self._states is not None
        slots = min(self.slots, what.starts.shape[1])  # those left out are empty
        self._states[:, :, :, self.slots - slots :] = what.states[:, :, :, what.states.shape[3] - slots :]
        if self._leads:
            self._slots.hold(what.starts, what.length)
        self.is_empty = False

    def reset(self) -> None:
        """Forget everything, and keep the tensors."""
        self._leave_inference_mode()
        self.is_empty = True
        if self._leads:
            self._slots.empty()

    def reorder(self, index: Tensor) -> None:
        """Take the rows of the batch by `index` [B], as beam search chooses them."""
        self._leave_inference_mode()
        if self._leads:
            self._slots.reorder(index)
        if self._states is not None:
            self._states.copy_(self._states.index_select(1, index.to(self._states.device)))

    def _allocate(self, key: Tensor) -> None:
        """Tensors for keys of this batch, heads, features, dtype and device, unless those of earlier sequences fit."""
        shape = (2, *key.shape[:2], self.slots, key.shape[3])
        mine = self._states
        if mine is None or mine.shape != shape or (mine.dtype, mine.device) != (key.dtype, key.device):
            self._states = key.new_zeros(shape)
            fix_addresses(self._states)

    def _leave_inference_mode(self) -> None:
        if self._leads:
            self._slots.leave_inference_mode()
        if writable(self, "_states"):
            fix_addresses(self._states)


class FollowingLayerCache(StaticLayerCache):
    """The cache of a later layer of a model, with the slots of an earlier one of its pattern.

    Both see the same tokens, the earlier layer first. So `length` is that of the earlier layer, which counts the new
    tokens already; and the earlier layer alone resets and reorders what both share.

    Args:
        leader: the cache of the earlier layer.
    """

    _leads = False

    def __init__(self, leader: StaticLayerCache) -> None:
        super().__init__(leader.pattern, leader.max_length)
        self._slots = leader._slots
