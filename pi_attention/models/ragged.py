"""Attention of requests that lie one behind another in a row, each with keys of its own number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from pi_attention.cache.contract import RaggedKeys
from pi_attention.cache.near import NearSinks, RaggedSinks
from pi_attention.models.caching import BoundedCache
from pi_attention.nn.sources import Operator
from pi_attention.ops.paged import Pages
from pi_attention.pattern import PiPattern
from pi_attention.stack import DENSE


class Bounded(NamedTuple):
    """The layers that keep sinks and the tokens in reach; the others, dense or with skips=None, keep every token."""

    patterns: list[PiPattern]
    reach: int
    """The longest of them, for which all have room; so with sinks."""
    sinks: int

    @classmethod
    def among(cls, patterns: list[PiPattern]) -> Bounded:
        """Of the layers of a model."""
        kept = [p for p in patterns if p.reach is not None and p.reach < DENSE.window - 1]
        return cls(kept, max((p.reach or 0 for p in kept), default=0), max((p.sinks for p in kept), default=0))


class Parts(NamedTuple):
    """The requests of a row by what they need."""

    fresh: tuple[Tensor, Tensor, Tensor | None] | None
    """Without earlier keys: the places of their queries and of their keys, and segment ids where they are several."""
    decoding: tuple[Tensor, Pages] | None
    """With one query, and earlier keys: the places of the queries, and where the keys lie in the row."""
    others: list[tuple[slice, slice]]
    """Queries and keys of each."""


@dataclass(frozen=True)
class Requests:
    """Of each request in a row: how many queries and how many keys it has, and where they start.

    The queries of a request are at the end of its keys.
    """

    queries: list[int]
    keys: list[int]
    _parts: dict[torch.device, Parts] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def spans(self) -> list[tuple[slice, slice]]:
        """Where the queries and where the keys of each request lie."""
        first_queries, first_keys = accumulate(self.queries, initial=0), accumulate(self.keys, initial=0)
        starts = zip(first_queries, first_keys, self.queries, self.keys, strict=False)
        return [(slice(q, q + t), slice(k, k + s)) for q, k, t, s in starts]

    def parts(self, device: torch.device) -> Parts:
        """The kinds of requests, told apart once for all layers: a tensor from the host waits for the GPU."""
        if device not in self._parts:
            self._parts[device] = self._told_apart(device)
        return self._parts[device]

    def _told_apart(self, device: torch.device) -> Parts:
        fresh: list[tuple[slice, slice]] = []
        decoding: list[tuple[slice, slice]] = []
        others: list[tuple[slice, slice]] = []
        for span, queries, keys in zip(self.spans, self.queries, self.keys, strict=True):
            if queries:
                (fresh if queries == keys else decoding if queries == 1 else others).append(span)
        parts = Parts(None, None, others)
        if fresh:
            ids = _numbered([q.stop - q.start for q, _ in fresh], device) if len(fresh) > 1 else None
            places, of_keys = (_places([span[side] for span in fresh], device) for side in (0, 1))
            parts = parts._replace(fresh=(places, of_keys, ids))
        if decoding:
            spans = [k for _, k in decoding]
            pages = Pages.of([span.stop - span.start for span in spans], _places(spans, device))
            parts = parts._replace(decoding=(_places([q for q, _ in decoding], device), pages))
        return parts

    def attend(
        self,
        operator: Operator,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None,
        moving: RaggedSinks | None = None,
    ) -> Tensor:
        """The operator, each request for itself: [1, H, ΣT, D].

        Requests without earlier keys are one packed call, those with one query one left-padded batch.

        Args:
            operator: of the layer.
            query: [1, H, ΣT, D].
            key: [1, G, ΣS, D], like value.
            value: like key.
            gate: logits [1, H, ΣT], or None.
            moving: sinks that move along; None where they stay.
        """
        parts = self.parts(query.device)
        out = torch.empty_like(query)
        if parts.fresh is not None:
            places, of_keys, ids = parts.fresh
            of_gate = None if gate is None else gate[:, :, places]
            attend = operator if moving is None else moving.around(operator, places, moving.position[:, places])
            out[:, :, places] = attend(query[:, :, places], key[:, :, of_keys], value[:, :, of_keys], of_gate, ids)
        if parts.decoding is not None:
            places, pages = parts.decoding
            slots, ids = pages.padded
            keys, values = (x[0][:, slots].transpose(0, 1) for x in (key, value))  # [requests, G, longest, D]
            if moving is not None:
                moving.move(keys, places, pages.first)
            of_gate = None if gate is None else gate[:, :, places]
            out[:, :, places] = one_query_each(operator, query[:, :, places], keys, values, of_gate, ids)
        for q, k in parts.others:
            of_gate = None if gate is None else gate[:, :, q]
            attend = operator
            if moving is not None:
                attend = moving.around(operator, q, torch.arange(k.stop - k.start, device=query.device)[None])
            out[:, :, q] = attend(query[:, :, q], key[:, :, k], value[:, :, k], of_gate, None)
        return out


class RaggedLayer(RaggedKeys):
    """The paged cache of one layer in one forward; a subclass writes and reads, in `extend`.

    Args:
        pattern: of the layer.
        requests: how many queries and keys each has.
    """

    length = 0
    seen_ids: None = None
    moving: RaggedSinks | None = None
    """See `RaggedCall.move_sinks`."""

    def __init__(self, pattern: PiPattern, requests: Requests) -> None:
        self.pattern, self._requests = pattern, requests

    @property
    def storage(self) -> RaggedLayer:
        """Itself, which a layer extends."""
        return self

    def extend(self, key: Tensor, value: Tensor, segment_ids: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
        """Write the new keys [1, G, ΣT, D] and return those that they see, request by request: [1, G, ΣS, D]."""
        raise NotImplementedError

    def attend(self, operator: Operator, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None) -> Tensor:
        """See `RaggedKeys`."""
        return self._requests.attend(operator, query, key, value, gate, self.moving)


class RaggedCall(BoundedCache, Cache):
    """The paged caches of all layers for one forward of a model, in which requests lie one behind another in one row.

    Args:
        layers: of the model.
    """

    moves_sinks = False

    def __init__(self, layers: Sequence[RaggedLayer]) -> None:
        cached: list[Any] = list(layers)
        Cache.__init__(self, layers=cached)

    def get_seq_length(self, layer: int = 0) -> int:
        """Not asked for: every forward passes its positions."""
        return 0

    def move_sinks(self, near: list[NearSinks | None], position: Tensor) -> None:
        """Let the sinks of layers move along in this forward: how those of each move, None where they stay.

        Args:
            near: of each layer.
            position: [1, ΣT] of the new tokens, each in its own request.
        """
        for layer, of_layer in zip(self.layers, near, strict=True):
            layer.moving = None if of_layer is None else RaggedSinks(of_layer, layer.pattern.sinks, position)

    def segments(self, *args: Any) -> None:
        """None: `RaggedLayer.attend` keeps requests apart."""

    def tell(self, segment_ids: Tensor | None) -> None:
        """Nothing to tell."""

    def library_mask(self, attention_mask: Tensor | None, like: Tensor) -> Tensor:
        """See `BoundedCache.library_mask`; of four dimensions, so that transformers makes none."""
        return like.new_ones(len(like), 1, 1, 1)

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers' caches: what the layer sees."""
        return self.layers[layer].extend(key, value)[:2]


def _places(spans: list[slice], device: torch.device) -> Tensor:
    """The places in the spans, one span behind another."""
    return torch.cat([torch.arange(span.start, span.stop, device=device) for span in spans])


def _numbered(lengths: list[int], device: torch.device) -> Tensor:
    """Segment ids [1, sum of the lengths]: the number of the request."""
    number = torch.arange(len(lengths), dtype=torch.int32, device=device)
    return number.repeat_interleave(torch.tensor(lengths, device=device))[None]


def one_query_each(
    operator: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    ids: Tensor | None,
    *pages: Pages,
) -> Tensor:
    """The operator where each of N requests has one query: [1, H, N, D].

    Args:
        operator: of the layer.
        query: [1, H, N, D].
        key: [N, G, longest, D], padded on the left, like value; with pages [slots, G, D].
        value: like key.
        gate: logits [1, H, N], or None.
        ids: [N, longest], −1 for padding; None where nothing is padded.
        pages: where the keys of each request lie, if they were not gathered.
    """
    queries = query[0].transpose(0, 1)[:, :, None]  # [N, H, 1, D]
    of_gate = None if gate is None else gate[0].T[:, :, None]
    out = operator(queries, key, value, of_gate, ids, *pages)
    return out[:, :, 0].transpose(0, 1)[None]
