"""What a decoding cache of one layer holds for later tokens, in a form that every storage gives and takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pi_attention.cache.contract import sink_places, take
from pi_attention.pattern import PiPattern


class Held(NamedTuple):
    """The tokens that later queries can see: the sinks of each row's last segment, then the last tokens."""

    states: Tensor
    """Keys and values [2, B, G, sinks + last, D]; the sink slots are filled from the right."""
    starts: Tensor
    """[B, sinks + last] int32, where the segment of each starts; −1 for padding and empty slots."""
    length: int
    """Tokens seen, these included."""


def last_tokens(pattern: PiPattern, length: int) -> int:
    """How many of the last tokens are held: those in reach, and the newest, whose segment goes on."""
    return length if pattern.reach is None else min(length, max(pattern.reach, 1))


def held(states: Tensor, starts: Tensor, length: int, pattern: PiPattern) -> Held:
    """Leave out what no later query can see.

    Args:
        states: keys and values [2, B, G, n, D] in their order, at least `pattern.sinks` slots before the last tokens.
        starts: [B, n] int32, as in `Held`.
        length: tokens seen.
        pattern: of the layer.
    """
    last = last_tokens(pattern, length)
    place, kept = held_starts(starts, last, pattern.sinks)
    return Held(held_states(states, place, pattern.sinks, last), kept.to(torch.int32, copy=True), length)


def held_starts(starts: Tensor, last: int, sinks: int) -> tuple[Tensor | None, Tensor]:
    """Which of the tokens before the last ones are the sinks of each row's last segment; and where both start.

    Args:
        starts: [B, n] as in `Held`, of slots and tokens in their order.
        last: tokens that are held.
        sinks: slots.

    Returns:
        Places [B, sinks], −1 for an empty slot, or None without sinks; and starts [B, sinks + last].
    """
    before = starts.shape[1] - last
    if not sinks:
        return None, starts[:, before:]
    place = sink_places(starts[:, :before], starts[:, -1:], sinks)
    of_sinks = torch.where(place < 0, -1, starts[:, -1:])
    return place, torch.cat([of_sinks, starts[:, before:]], dim=1)


def held_states(states: Tensor, place: Tensor | None, sinks: int, last: int) -> Tensor:
    """Sinks, then the last tokens, [..., sinks + last, D] of keys or values [..., B, G, n, D], or of both; copied.

    Args:
        states: at least sinks + last tokens.
        place: [B, sinks], where the sinks are; None for the first tokens.
        sinks, last: how many there are.
    """
    first = states[..., :sinks, :]
    if place is not None:
        index = place[:, None, :, None]
        first = take(states, index if states.dim() == 4 else index[None], -2)
    return torch.cat([first, states[..., states.shape[-2] - last :, :]], dim=-2)
