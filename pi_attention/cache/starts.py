"""Where the segments of a growing cache's keys start: the same in all layers of one pattern, which share the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pi_attention.cache.contract import going_on, sink_places, starts_of_new
from pi_attention.cache.held import held_starts
from pi_attention.segments import as_starts, starts_of_last

Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")


class Once:
    """Calls a function once for the layers that ask for it with the same inputs: the same tensors, equal numbers."""

    def __init__(self) -> None:
        self._last: dict[object, tuple[tuple[object, ...], object]] = {}

    def __call__(self, function: Callable[Inputs, Result], /, *inputs: Inputs.args, **none: Inputs.kwargs) -> Result:
        """The function's result of these inputs, or the last one if it was of the same. (None come by name.)"""
        if torch.compiler.is_compiling():
            return function(*inputs, **none)
        known, found = self._last.get(function, ((), None))
        if len(known) != len(inputs) or not all(map(_same, known, inputs)):
            found = function(*inputs, **none)
            self._last[function] = inputs, found
        return found  # type: ignore[return-value]

    def forget(self) -> None:
        """Forget all results: somebody may write to the inputs before they come again."""
        self._last.clear()


def _same(x: object, y: object) -> bool:
    return x is y or (not isinstance(x, Tensor) and not isinstance(y, Tensor) and x == y)


class Kept(NamedTuple):
    """What a growing cache holds, in numbers."""

    sinks: int
    """Slots for sinks, filled from the right."""
    tokens: int
    """Kept tokens behind them."""
    length: int
    """Tokens seen."""


class Step(NamedTuple):
    """Starts of the keys of one call, by position, −1 for padding and empty slots; all None for one segment a row."""

    every: Tensor | None = None
    """[B, sinks + kept + T], of the sink slots, the kept and the new tokens."""
    place: Tensor | None = None
    """[B, sinks], where the sinks of the last kept token's segment are among the slots and what is forgotten."""
    visible: Tensor | None = None
    """[B, sinks + kept − forgotten + T], of those sinks and what stays."""
    seen: Tensor | None = None
    """The same, as the operator takes it."""


def step(
    known: Tensor | None, new: Tensor | None, kept: Kept, tokens: int, forgotten: int, batch: int, device: torch.device
) -> Step:
    """The starts for one call that brings `tokens` tokens and forgets as many as `forgotten` of the kept ones.

    Args:
        known: [B, sinks + kept] of the slots and kept tokens; None where each row is one segment.
        new: segment ids of the new tokens, as `KeyValueCache.extend` takes them; None where the last segments go on.
        kept: what is held.
        tokens, forgotten, batch, device: of the call.

    Raises:
        ValueError: there are neither as many ids as tokens so far, nor as new ones.
    """
    if known is None and new is None:
        return Step()
    known = starts_of_kept(known, kept, batch, device)
    if new is not None:
        new = new_starts(new, kept.length, tokens, batch, device)
    elif known.shape[1]:
        new = going_on(known, kept.length, tokens)
    else:  # after a crop, where a token sees itself alone
        new = known.new_full((batch, tokens), kept.length)
    every = torch.cat([known, new], dim=1)
    place, visible = None, every[:, kept.sinks + forgotten :]
    if kept.sinks:
        current = known[:, -1:]  # not the first new token's: it may be taken back, and all of its segment is here
        place = sink_places(every[:, : kept.sinks + forgotten], current, kept.sinks)
        visible = torch.cat([torch.where(place < 0, -1, current), visible], dim=1)
    return Step(every, place, visible, starts_of_last(visible) if tokens == 1 else visible)


def new_starts(segment_ids: Tensor, length: int, tokens: int, batch: int, device: torch.device) -> Tensor:
    """Where the segments of the new tokens start, [B, T], of the ids that `KeyValueCache.extend` takes.

    Args:
        segment_ids: of all tokens so far, or the starts of the new ones.
        length: tokens before them.
        tokens, batch, device: of the call; the layers of one model may lie on several GPUs.

    Raises:
        ValueError: there are neither as many ids as tokens so far, nor as new ones.
    """
    if segment_ids.shape[1] not in (tokens, length + tokens):
        raise ValueError(
            f"segment_ids {tuple(segment_ids.shape)} must have {length + tokens} columns, one for each token so far, "
            f"the {length} cached ones included; or {tokens}, the starts of the new ones."
        )
    new = starts_of_new(segment_ids, tokens, length == 0)
    new = (new if len(new) == batch else new.expand(batch, -1)).to(device)
    return new if length else as_starts(new.clone(memory_format=torch.contiguous_format))  # held, and not the caller's


def of_prompt(starts: Tensor, last: int, sinks: int) -> tuple[Tensor | None, Tensor]:
    """`held_starts` of a prompt [B, T]; behind empty slots, and without places, where all of it stays."""
    if last == starts.shape[1] or not sinks:
        return None, F.pad(starts[:, starts.shape[1] - last :], (sinks, 0), value=-1)
    place, held = held_starts(F.pad(starts, (sinks, 0), value=-1), last, sinks)
    assert place is not None
    return place - sinks, held


def without_last(starts: Tensor, tokens: int) -> Tensor:
    """All but the last tokens."""
    return starts[:, : starts.shape[1] - tokens]


def rows(starts: Tensor, index: Tensor) -> Tensor:
    """The rows of the batch by `index` [new batch]."""
    return starts.index_select(0, index.to(starts.device))


def starts_of_kept(known: Tensor | None, kept: Kept, batch: int, device: torch.device) -> Tensor:
    """Where the segments of the sink slots and the kept tokens start, [B, sinks + kept]; `known`, if it is."""
    if known is not None:
        return known
    starts = torch.zeros(batch, kept.sinks + kept.tokens, dtype=torch.int32, device=device)  # a row is one segment
    starts[:, : kept.sinks - min(kept.sinks, kept.length - kept.tokens)] = -1
    return starts
