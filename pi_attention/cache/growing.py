"""A decoding cache of bounded memory that a step appends to: no copy of what it holds.

Skips are counted from the query, so over all future queries a pattern sees exactly the last `reach` tokens, and the
sinks. The last tokens lie in one buffer, which is appended to in place and rebuilt when it is full. The sinks stand
right before the first kept token, so that all kept keys are one contiguous view; the operator needs nothing but their
order, because a sink is visible whatever its lag. A prompt stays as it came until more tokens do: then most of it is
out of reach, and never copied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pi_attention.cache.contract import check_new, nbytes_of, take
from pi_attention.cache.held import Held, held, held_states, last_tokens
from pi_attention.cache.starts import Kept, Once, new_starts, of_prompt, rows, starts_of_kept, step, without_last
from pi_attention.ops.transforms import transforming
from pi_attention.pattern import PiPattern, need_pattern

LEAST = 64
"""Tokens for which a buffer has room at least; and with sinks, tokens that are forgotten together."""


class Prompt(NamedTuple):
    """The tokens of a first call."""

    key: Tensor
    value: Tensor
    starts: Tensor | None
    """[B, T], where their segments start; None: all are 0."""

    @property
    def is_alone(self) -> bool:
        """Whether keys and values hold no memory beside their own, as parts of a larger projection do."""
        if torch.compiler.is_compiling() or transforming():  # where there is no memory to ask for
            return False
        return all(x.untyped_storage().nbytes() <= x.nbytes for x in (self.key, self.value))


class LayerCache:
    """Keys and values that later queries of one layer can see; a `KeyValueCache`.

    Memory is bounded by about 1.25 · reach + sinks + 64 tokens whatever the length (unbounded when `skips=None`). All
    tokens of the first call are held until the second. Where gradients are enabled, a step copies what is held, because
    they may need it as it was: decode under `torch.no_grad`.

    Args:
        pattern: of the layer; it decides what is kept.
        once: shared by the caches of other layers of this pattern, which see the same tokens.

    Raises:
        TypeError, ValueError: no pattern, or a bidirectional one.

    Example::

        cache = LayerCache(pattern)
        key, value, _ = cache.extend(new_key, new_value)  # [B, G, kept + T, D]
        out = pi_attention(query, key, value, pattern)  # query [B, H, T, D]
    """

    length: int
    """Tokens seen so far, kept or not."""

    def __init__(self, pattern: PiPattern, once: Once | None = None) -> None:
        need_pattern(pattern)
        if not pattern.causal:
            raise ValueError("a decoding cache needs a causal pattern: with causal=False every token sees later ones.")
        self.pattern = pattern
        self._reach = pattern.reach  # asked for at every step
        self.recording = False
        self._once = Once() if once is None else once
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._once.forget()
        self.length = 0
        self._prompt: Prompt | None = None  # until the second call; then the buffer
        self._buffer: Tensor | None = None  # [2, B, G, capacity, D]: keys, values
        self._starts: Tensor | None = None  # [B, sinks + kept] of the sink slots and kept tokens; None: all are 0
        self._first = self._end = self.pattern.sinks  # kept tokens in the buffer; the sinks end at _first
        self._may_forget = True
        self._slots_since = 0  # tokens seen when the sink slots took the sinks of a segment, of several
        self._seen: tuple[int, Tensor | None, int] = (0, None, 0)  # of the keys last returned: number, starts, slots

    @property
    def keys(self) -> Tensor | None:
        """Kept keys [B, G, kept, D], sinks aside; None before the first update."""
        if self._prompt is not None:
            return self._prompt.key
        return None if self._buffer is None else self._buffer[0, :, :, self._first : self._end]

    @property
    def values(self) -> Tensor | None:
        """Kept values, like `keys`."""
        if self._prompt is not None:
            return self._prompt.value
        return None if self._buffer is None else self._buffer[1, :, :, self._first : self._end]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return nbytes_of(self._buffer, self._starts, *(self._prompt or ()))

    def record(self) -> None:
        """From now on forget tokens only after a `crop`: for speculative decoding, which takes tokens back."""
        self.recording = True

    def extend(
        self, key: Tensor, value: Tensor, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append, as `KeyValueCache.extend` says; some of the sink slots returned may be empty, with the id −1.

        With sinks, up to 64 tokens beyond the reach may be among the kept ones. The first keys and values come back as
        they are, and are held until the second call: do not write to them.

        Raises:
            ValueError: key and value do not have one shape [B, G, T, D], or another B, G or D than those kept.
        """
        self._lay_out()
        check_new(key, value, self._buffer)
        if self._buffer is None:
            return self._begin(key, value, segment_ids)
        new, slots = torch.stack([key, value]), self.pattern.sinks
        self._let_write()
        forgotten, tokens = self._due(key.shape[2]), key.shape[2]
        at = self._once(step, self._starts, segment_ids, self._kept, tokens, forgotten, len(key), key.device)
        sinks, starts = self._sinks_after_forgetting(forgotten, at.place), at.every
        if self._may_forget or not self.recording:
            if forgotten or at.place is not None:
                self._forget(forgotten, sinks)
            if at.place is not None:
                self._slots_since = self.length
            starts = at.visible
            self._may_forget, forgotten = False, 0
        self._append(new)
        self._starts, self.length = starts, self.length + tokens
        assert self._buffer is not None
        if forgotten and slots:
            seen = torch.cat([sinks, self._buffer[:, :, :, self._first + forgotten : self._end]], dim=3)
        else:
            seen = self._buffer[:, :, :, self._first + forgotten - sinks.shape[3] : self._end]
        self._seen = seen.shape[3], at.visible, slots
        return seen[0], seen[1], at.seen

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`extend` without segment ids: keys and values alone."""
        key, value, _ = self.extend(key, value)
        return key, value

    def is_sink(self) -> Tensor:
        """Which of the first n keys last returned are sinks of their segment, bool [B or 1, n]; later ones are none."""
        (keys, starts, slots), sinks = self._seen, self.pattern.sinks
        if starts is None:  # the first tokens of the only segment come first
            assert self.keys is not None
            return torch.ones(1, min(keys, sinks), dtype=torch.bool, device=self.keys.device)
        behind = starts[:, slots:]
        position = torch.arange(self.length - behind.shape[1], self.length, device=starts.device)
        return torch.cat([starts[:, :slots] >= 0, (behind >= 0) & (position - behind < sinks)], dim=1)

    def start_of_last(self, tokens: int) -> Tensor | int:
        """Position where the segments of the last tokens start, [B, tokens]; 0 for one segment a row."""
        starts = self._seen[1]
        return 0 if starts is None else starts[:, starts.shape[1] - tokens :]

    def resume(self, key: Tensor, value: Tensor, length: int) -> None:
        """As if `length` tokens of one segment had been seen, elsewhere.

        Args:
            key: [B, G, kept, D] of the last tokens, as many as the pattern reaches, with the sinks before them.
            value: like key.
            length: tokens seen.
        """
        reach, sinks = self._reach, self.pattern.sinks
        last = length if reach is None else min(length, reach)
        self.reset()
        self._fill(key, value, min(sinks, length - last))
        self.length = length

    def held(self) -> Held:
        """What later tokens can see, copied.

        Raises:
            ValueError: no token has come.
        """
        self._lay_out()
        if self._buffer is None:
            raise ValueError("the cache is empty: let it see tokens first.")
        states = self._buffer[:, :, :, self._first - self.pattern.sinks : self._end]
        starts = starts_of_kept(self._starts, self._kept, states.shape[1], states.device)
        return held(states, starts, self.length, self.pattern)

    def hold(self, what: Held) -> None:
        """Go on from a copy of what another cache of this pattern held, in place of what is here."""
        self.reset()
        sinks = self.pattern.sinks
        self._buffer, self._end, self.length = what.states.clone(), what.states.shape[3], what.length
        one_segment = bool((what.starts[:, sinks:] == 0).all())
        if not one_segment:
            self._starts, self._slots_since = what.starts, what.length if sinks else 0

    def check_crop(self, tokens: int) -> None:
        """Raise ValueError where `crop` would."""
        if tokens == self.length:
            return
        reach, kept = self._reach, self._end - self._first if self._prompt is None else self.length
        left, least = self.length - tokens, int(self._starts is not None and self.pattern.sinks > 0)  # whose sinks stay
        needed = left if reach is None else min(left, max(reach, least))
        if not 0 <= tokens <= self.length or kept - tokens < needed:
            raise ValueError(
                f"cannot forget the last {tokens} of {self.length} tokens: {kept} are kept, and {needed} must be left. "
                "Call record() before the tokens that may be taken back."
            )
        if left < self._slots_since:
            raise ValueError(
                f"cannot forget the last {tokens} of {self.length} tokens: with segments, sinks before token "
                f"{self._slots_since} are gone. Call record() before the tokens that may be taken back."
            )

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens.

        Raises:
            ValueError: tokens that the pattern sees from there are gone; call `record` before the updates.
        """
        self.check_crop(tokens)
        if tokens == self.length:
            self.reset()
            return
        self.length = left = self.length - tokens
        if self._prompt is not None:
            key, value, starts = self._prompt
            starts = None if starts is None else self._once(without_last, starts, tokens)
            self._prompt = Prompt(key[:, :, :left], value[:, :, :left], starts)
        else:
            self._end -= tokens
        if self._starts is not None:
            self._starts = self._once(without_last, self._starts, tokens)
        self._may_forget = True

    def reorder(self, index: Tensor) -> None:
        """Take the rows of the batch by `index` [new batch], as beam search chooses them."""
        self._lay_out()
        if self._buffer is not None:
            self._buffer = self._buffer.index_select(1, index.to(self._buffer.device))
        if self._starts is not None:
            self._starts = self._once(rows, self._starts, index)

    def to(self, device: torch.device | str) -> LayerCache:
        """Move what is held; the same cache, as of `nn.Module.to`."""
        self._lay_out()
        self._buffer = None if self._buffer is None else self._buffer.to(device)
        self._starts = None if self._starts is None else self._starts.to(device)
        return self

    def _begin(self, key: Tensor, value: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """`extend` for the first tokens, which are returned and held as they are."""
        tokens = key.shape[2]
        starts = None
        if segment_ids is not None:
            starts = self._once(new_starts, segment_ids, 0, tokens, len(key), key.device)
        self._prompt = Prompt(key, value, starts)
        if not self._prompt.is_alone:
            self._prompt = Prompt(key.clone(), value.clone(), starts)
        self.length, self._may_forget, self._seen = tokens, False, (tokens, starts, 0)
        return key, value, starts

    def _lay_out(self) -> None:
        """Copy what later queries can see of a prompt into a buffer."""
        if self._prompt is None:
            return
        (key, value, starts), self._prompt = self._prompt, None
        tokens, place = key.shape[2], None
        last = last_tokens(self.pattern, tokens) if self._may_forget or not self.recording else tokens
        slots = min(self.pattern.sinks, tokens - last)
        if starts is not None:
            place, self._starts = self._once(of_prompt, starts, last, self.pattern.sinks)
            slots = 0 if place is None else self.pattern.sinks
            self._slots_since = 0 if place is None else tokens
        if last < tokens:
            key, value = (held_states(x, place, slots, last) for x in (key, value))
        self._fill(key, value, slots)

    def _fill(self, key: Tensor, value: Tensor, slots: int) -> None:
        """A buffer of these tokens, of which the first `slots` are sinks."""
        empty = key.new_zeros(2, *key.shape[:2], self.pattern.sinks - slots, key.shape[3])
        self._buffer = torch.cat([empty, torch.stack([key, value])], dim=3)
        self._end = self._buffer.shape[3]

    def _let_write(self) -> None:
        """Copy a buffer of inference mode, which alone may write to it."""
        assert self._buffer is not None
        if not torch.compiler.is_compiling() and self._buffer.is_inference() and not torch.is_inference_mode_enabled():
            self._buffer = self._buffer.clone()

    @property
    def _kept(self) -> Kept:
        return Kept(self.pattern.sinks, self._end - self._first, self.length)

    def _due(self, tokens: int) -> int:
        """How many of the first kept tokens, which no later query sees, go before so many new ones.

        Forgetting moves sinks, so with these it waits for some tokens, or for a buffer that is full and rebuilt anyway.
        They are few, since kernels are planned for each number of keys.
        """
        assert self._buffer is not None
        unseen = 0 if self._reach is None else max(0, self._end - self._first - self._reach)
        full = self._end + tokens > self._buffer.shape[3]
        return unseen if full or unseen >= LEAST or not self.pattern.sinks else 0

    def _sinks_after_forgetting(self, forgotten: int, place: Tensor | None) -> Tensor:
        """The sinks that are no kept tokens once `forgotten` more are gone, [2, B, G, slots, D].

        They are found among the present sink slots and the forgotten tokens, which are neighbours in the buffer: by
        their places [B, slots], or, where each row is one segment and `place` is None, as many as are filled.
        """
        assert self._buffer is not None
        sinks = self.pattern.sinks
        if not sinks:
            return self._buffer[:, :, :, :0]
        known = self._buffer[:, :, :, self._first - sinks : self._first + forgotten]
        if place is not None:
            return take(known, place[None, :, None, :, None], 3)
        before = self.length - (self._end - self._first)  # the first tokens, which stand in their order
        empty, slots = sinks - min(before, sinks), min(before + forgotten, sinks)
        found = known[:, :, :, empty : empty + slots]
        return found.clone() if forgotten else found

    def _forget(self, tokens: int, sinks: Tensor) -> None:
        """Drop the first kept tokens and put `sinks` before what is left."""
        assert self._buffer is not None
        self._first += tokens
        if sinks.shape[3]:
            if torch.is_grad_enabled():
                self._buffer = self._buffer.clone()  # a graph may hold the old one, that of the queries if no other
            self._buffer[:, :, :, self._first - sinks.shape[3] : self._first] = sinks

    def _append(self, new: Tensor) -> None:
        assert self._buffer is not None
        tokens, capacity = new.shape[3], self._buffer.shape[3]
        kept = slice(self._first - self.pattern.sinks, self._end)
        needed = kept.stop - kept.start + tokens
        reserve = max(LEAST, needed // 4)
        graph = torch.is_grad_enabled()  # and then the queries' gradients may need these keys as they are
        if graph or self._end + tokens > capacity or capacity > 2 * (needed + reserve):
            room = [] if graph else [new.new_empty(*new.shape[:3], reserve, new.shape[4])]
            self._buffer = torch.cat([self._buffer[:, :, :, kept], new, *room], dim=3)
            self._first, self._end = self.pattern.sinks, needed
        else:
            self._buffer[:, :, :, self._end : self._end + tokens] = new
            self._end += tokens
