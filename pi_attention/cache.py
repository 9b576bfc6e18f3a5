"""The keys and values of one layer that its pattern can still see: a decoding cache of bounded memory.

Skips are counted from the query, so over all future queries a pattern sees exactly the last `reach` tokens, and the
sinks. The last tokens lie in one buffer, which is appended to in place and rebuilt when it is full: a step costs no
copy of the cache. The sinks stand right before the first kept token, so that all kept keys are one contiguous view;
the operator needs nothing but their order, because a sink is visible whatever its lag.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pi_attention.pattern import PiPattern, need_pattern
from pi_attention.segments import segment_starts


class LayerCache:
    """Keys and values that later queries of one layer can see.

    Memory is bounded by about 1.25 · reach + sinks + 64 tokens whatever the length (unbounded when `skips=None`).

    Args:
        pattern: of the layer; it decides what is kept.

    Example::

        cache = LayerCache(pattern)
        key, value, _ = cache.extend(new_key, new_value)  # [B, G, kept + T, D]
        out = pi_attention(query, key, value, pattern)  # query [B, H, T, D]
    """

    length: int
    """Tokens seen so far, kept or not."""

    def __init__(self, pattern: PiPattern) -> None:
        need_pattern(pattern)
        if not pattern.causal:
            raise ValueError("a decoding cache needs a causal pattern: with causal=False every token sees later ones.")
        self.pattern = pattern
        self.recording = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self._buffer: Tensor | None = None  # [2, B, G, capacity, D]: keys, values
        self._first = self._end = self.pattern.sinks  # kept tokens in the buffer; the sinks end at _first
        self._may_forget = True
        self._view_tokens = 0  # kept tokens among the keys last returned
        self._all_sinks: Tensor | None = None  # 0 … sinks − 1, once all have left the kept tokens
        self._view_sinks: Tensor | None = None  # positions of its sinks, [B or 1, slots], −1 for an empty slot

    @property
    def kept(self) -> Tensor | None:
        """Kept keys and values [2, B, G, kept, D], sinks aside; None before the first update."""
        return None if self._buffer is None else self._buffer[:, :, :, self._first : self._end]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._buffer is None else self._buffer.untyped_storage().nbytes()

    def record(self) -> None:
        """From now on forget tokens only after a `crop`: for speculative decoding, which takes tokens back."""
        self.recording = True

    def update(self, key: Tensor, value: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Append T new tokens and return what their queries can see: sinks, kept tokens, new tokens.

        Args:
            key: [B, G, T, D], after rotary embedding.
            value: like key.
            starts: [B], the position (padding counted, from 0) where the segment of the first new token begins, −1 for
                padding; None when each row is one segment from position 0. Only sinks need it.

        Returns:
            key and value, [B, G, kept + T, D], to be passed to `pi_attention` with the new queries. When `starts` is
            given, some sink slots may be empty: take the segment ids of the returned keys from `select`.

        Raises:
            ValueError: key and value do not have one shape [B, G, T, D], or another B, G or D than those kept.
        """
        self._check(key, value)
        new = torch.stack([key, value])
        if self._buffer is None:
            self._buffer = new.new_zeros(*new.shape[:3], self.pattern.sinks, new.shape[4])
        elif (
            not torch.compiler.is_compiling() and self._buffer.is_inference() and not torch.is_inference_mode_enabled()
        ):
            self._buffer = self._buffer.clone()  # of inference mode, which alone may write to it
        reach = self.pattern.reach
        forgotten = 0 if reach is None else max(0, self._end - self._first - reach)
        sinks = self._sinks_after_forgetting(forgotten, starts)
        if self._may_forget or not self.recording:
            self._forget(forgotten, sinks)
            self._may_forget, forgotten = False, 0
        self._append(new)
        self.length += new.shape[3]
        recent = self._buffer[:, :, :, self._first + forgotten : self._end]
        self._view_tokens = recent.shape[3]
        slots = sinks.shape[3]
        if not slots:
            seen = recent
        elif forgotten:
            seen = torch.cat([sinks, recent], dim=3)
        else:
            seen = self._buffer[:, :, :, self._first - slots : self._end]
        return seen[0], seen[1]

    def extend(
        self, key: Tensor, value: Tensor, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`update`, told the segment ids [B, length + T]; keys, values, and the segment ids of the keys returned."""
        starts = None
        if segment_ids is not None and self.pattern.sinks:
            starts = segment_starts(segment_ids)[:, self.length]
        key, value = self.update(key, value, starts)
        return key, value, None if segment_ids is None else self.select(segment_ids)

    def _check(self, key: Tensor, value: Tensor) -> None:
        if key.dim() != 4 or key.shape != value.shape:
            raise ValueError(
                f"key {tuple(key.shape)} and value {tuple(value.shape)} must have one shape [B, G, T, D], heads before "
                "tokens."
            )
        if self._buffer is None:
            return
        _, batch, heads, _, dim = self._buffer.shape
        if (key.shape[0], key.shape[1], key.shape[3]) != (batch, heads, dim):
            raise ValueError(
                f"key {tuple(key.shape)} must be [{batch}, {heads}, T, {dim}], as the tokens before it: call reset() "
                "before another sequence."
            )

    def resume(self, key: Tensor, value: Tensor, length: int) -> None:
        """As if `length` tokens of one segment had been seen, elsewhere.

        Args:
            key: [B, G, kept, D] of the last tokens, as many as the pattern reaches, with the sinks before them.
            value: like key.
            length: tokens seen.
        """
        reach, sinks = self.pattern.reach, self.pattern.sinks
        last = length if reach is None else min(length, reach)
        slots = min(sinks, length - last)
        empty = key.new_zeros(2, *key.shape[:2], sinks - slots, key.shape[3])
        self.reset()
        self._buffer = torch.cat([empty, torch.stack([key, value])], dim=3)
        self._end, self.length = sinks + last, length

    def select(self, per_token: Tensor, empty: int = -1) -> Tensor:
        """The entries of `per_token` [B, length] for the keys last returned; `empty` for empty sink slots."""
        recent = per_token[:, self.length - self._view_tokens : self.length]
        if self._view_sinks is None:
            return recent
        index = self._view_sinks.expand(len(per_token), -1)
        sinks = per_token.gather(1, index.clamp(min=0)).masked_fill(index < 0, empty)
        return torch.cat([sinks, recent], dim=1)

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens.

        Raises:
            ValueError: tokens that the pattern sees from there are gone; call `record` before the updates.
        """
        kept, reach = self._end - self._first, self.pattern.reach
        left = self.length - tokens
        needed = left if reach is None else min(left, reach)
        if not 0 <= tokens <= self.length or kept - tokens < needed:
            raise ValueError(
                f"cannot forget the last {tokens} of {self.length} tokens: {kept} are kept, and {needed} must be left. "
                "Call record() before the tokens that may be taken back."
            )
        self._end -= tokens
        self.length = left
        self._may_forget = True

    def reorder(self, index: Tensor) -> None:
        """Take the rows of the batch by `index` [new batch], as beam search chooses them."""
        if self._buffer is not None:
            self._buffer = self._buffer.index_select(1, index.to(self._buffer.device))

    def to(self, device: torch.device | str) -> None:
        """Move the buffer."""
        if self._buffer is not None:
            self._buffer = self._buffer.to(device)

    def _sinks_after_forgetting(self, forgotten: int, starts: Tensor | None) -> Tensor:
        """Keys and values of the sinks that are no kept tokens once `forgotten` more are gone, [2, B, G, slots, D].

        They are found among the present sink slots and the forgotten tokens, which are neighbours in the buffer. With
        `starts` there are `sinks` slots, filled from the right; without, as many as are filled.
        """
        assert self._buffer is not None
        sinks = self.pattern.sinks
        known = self._buffer[:, :, :, self._first - sinks : self._first + forgotten]
        self._view_sinks = None
        if not sinks:
            return known[:, :, :, :0]
        first_kept = self.length - (self._end - self._first)
        device = known.device
        if starts is None and first_kept >= sinks:  # each in its slot, where it stays: a step looks for none
            if self._all_sinks is None or self._all_sinks.device != device:
                self._all_sinks = torch.arange(sinks, device=device)[None]
            self._view_sinks = self._all_sinks
            return known[:, :, :, :sinks].clone() if forgotten else known
        start = torch.zeros(1, dtype=torch.long, device=device) if starts is None else starts.to(device).long()
        start = torch.where(start < 0, self.length, start)[:, None]  # [B or 1, 1]
        before = (first_kept - start).clamp(0, sinks)  # sinks in slots now
        after = (first_kept + forgotten - start).clamp(0, sinks)  # and then
        number = torch.arange(sinks, device=device) - (sinks - after)  # which sink a slot holds; negative: none
        where = torch.where(number < before, sinks - before + number, sinks + start + number - first_kept)
        where = where.clamp(0, known.shape[3] - 1)
        positions = torch.where(number < 0, -1, start + number)
        if starts is None:
            slots = min(sinks, first_kept + forgotten)
            where, positions = where[:, sinks - slots :], positions[:, sinks - slots :]
        if where.shape[1]:
            self._view_sinks = positions
        index = where[None, :, None, :, None].expand(2, known.shape[1], known.shape[2], -1, known.shape[4])
        return known.gather(3, index)

    def _forget(self, tokens: int, sinks: Tensor) -> None:
        """Drop the first kept tokens and put `sinks` before what is left."""
        assert self._buffer is not None
        self._first += tokens
        if sinks.shape[3]:
            if torch.is_grad_enabled() and self._buffer.requires_grad:
                self._buffer = self._buffer.clone()  # the graph holds the old one
            self._buffer[:, :, :, self._first - sinks.shape[3] : self._first] = sinks

    def _append(self, new: Tensor) -> None:
        assert self._buffer is not None
        tokens, capacity = new.shape[3], self._buffer.shape[3]
        kept = slice(self._first - self.pattern.sinks, self._end)
        needed = kept.stop - kept.start + tokens
        reserve = max(64, needed // 4)
        graph = torch.is_grad_enabled() and (new.requires_grad or self._buffer.requires_grad)
        if graph or self._end + tokens > capacity or capacity > 2 * (needed + reserve):
            room = [] if graph else [new.new_empty(*new.shape[:3], reserve, new.shape[4])]
            self._buffer = torch.cat([self._buffer[:, :, :, kept], new, *room], dim=3)
            self._first, self._end = self.pattern.sinks, needed
        else:
            self._buffer[:, :, :, self._end : self._end + tokens] = new
            self._end += tokens
