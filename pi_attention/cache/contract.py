"""What a layer asks of a decoding cache, whichever it is; and which tokens every cache keeps as sinks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pi_attention.segments import segment_starts


class KeyValueCache(Protocol):
    """The keys and values of one layer that its pattern can still see."""

    @property
    def length(self) -> int | Tensor:
        """Position of the first new token."""
        ...

    def extend(
        self, key: Tensor, value: Tensor, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append T new tokens and return what their queries can see: sinks, kept tokens, new tokens.

        Args:
            key: [B, G, T, D], after rotary embedding.
            value: like key.
            segment_ids: [B, length + T] of all tokens so far, the cached ones included; or [B, T] of the new ones
                alone, each the position where its segment starts, −1 for padding (`segment_starts`). None when each
                row is one segment from position 0.

        Returns:
            key and value [B, G, S, D], and their segment ids [B, S], None when no segments were ever given.
        """
        ...

    def resume(self, key: Tensor, value: Tensor, length: int) -> None:
        """As if `length` tokens had been seen, of which these keys and values are the ones to keep."""
        ...


def check_new(key: Tensor, value: Tensor, kept: Tensor | None) -> None:
    """Raise ValueError for new keys and values that do not go on with the kept ones [2, B, G, ·, D]."""
    if key.dim() != 4 or key.shape != value.shape:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} must have one shape [B, G, T, D], heads before "
            "tokens."
        )
    if kept is None:
        return
    _, batch, heads, _, dim = kept.shape
    if (key.shape[0], key.shape[1], key.shape[3]) != (batch, heads, dim):
        raise ValueError(
            f"key {tuple(key.shape)} must be [{batch}, {heads}, T, {dim}], as the tokens before it: call reset() "
            "before another sequence."
        )


class RaggedKeys:
    """A `KeyValueCache` whose `extend` returns keys of many requests, one behind another in one row."""

    def attend(
        self, operator: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None
    ) -> Tensor:
        """The operator, each request for itself: [1, H, ΣT, D].

        Args:
            operator: output of query, key, value, gate, segment ids of the keys, and perhaps `ops.paged.Pages` of them.
            query: [1, H, ΣT, D], the new tokens of every request.
            key: of `extend`, like value.
            value: like key.
            gate: logits [1, H, ΣT], or None.
        """
        raise NotImplementedError


def nbytes_of(*tensors: Tensor | None) -> int:
    """Bytes allocated for tensors, None where there is none."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


def starts_of_new(segment_ids: Tensor, tokens: int, first: bool) -> Tensor:
    """Where the segments of the last T = `tokens` tokens start, [B, T], of the ids that `extend` takes.

    Args:
        segment_ids: of all tokens so far, or the starts of the last T.
        tokens: T.
        first: no token came before them.
    """
    if first or segment_ids.shape[1] > tokens:
        segment_ids = segment_starts(segment_ids)
    if segment_ids.shape[1] > tokens:
        segment_ids = segment_ids[:, -tokens:]
    return segment_ids.to(torch.int32)


def going_on(starts: Tensor, length: int | Tensor, tokens: int) -> Tensor:
    """Starts [B, tokens] of new tokens that go on with the last segment of each row; after padding one starts here.

    Args:
        starts: [B, n] of the tokens before them, n at least 1.
        length: how many tokens came before them.
        tokens: how many there are.
    """
    last = starts[:, -1:]
    here = length.to(last.dtype) if isinstance(length, Tensor) else length
    return torch.where(last < 0, here, last).expand(-1, tokens)


def sink_places(starts: Tensor, current: Tensor, sinks: int) -> Tensor:
    """Which tokens are the sinks of a segment, once all of these are forgotten: their places [B, sinks].

    The slots are filled from the right; −1 is an empty one.

    Args:
        starts: [B, n] of the sink slots now, and of the tokens behind them that are forgotten; −1 where there is none.
        current: [B, 1], the start of the segment whose sinks are wanted; −1 for none.
        sinks: number of slots.
    """
    found = ((starts == current) & (current >= 0)).cumsum(dim=1)
    filled = found[:, -1:].clamp(max=sinks)
    number = torch.arange(sinks, device=starts.device) - (sinks - filled)  # which sink a slot holds; negative: none
    place = torch.searchsorted(found, number.clamp(min=0) + 1).clamp(max=starts.shape[1] - 1)
    return torch.where(number < 0, -1, place)


def take(source: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries of `source` along `dim` by an index that is broadcast over the other dimensions; any for −1."""
    shape = list(source.shape)
    shape[dim] = index.shape[dim]
    return source.gather(dim, index.clamp(min=0).expand(shape))
