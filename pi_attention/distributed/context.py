"""Context parallelism: a sequence sharded over ranks, each of which sees the keys of its neighbours that it needs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from pi_attention.cache.contract import KeyValueCache
from pi_attention.distributed.exchange import Extend, Finish, Flight, Route, Start, route, unpacked
from pi_attention.distributed.plan import halo_plan
from pi_attention.nn.sources import KeySource, Operator
from pi_attention.ops.api import Fusion, as_autocast, pi_attention
from pi_attention.pattern import PiPattern
from pi_attention.segments import have_values


def shard(x: Tensor, ends: Sequence[int], rank: int, dim: int = 1) -> Tensor:
    """A rank's part of a tensor over the whole sequence; `ends` are where the shards of all ranks end."""
    start = ends[rank - 1] if rank else 0
    return x.narrow(dim, start, ends[rank] - start)


SHORT = 1 << 25
"""Elements of queries on a GPU below which a second call of the operator costs more host time than messages take."""


class Started(NamedTuple):
    """Keys and values [B, G, T, D] of a shard whose message is on its way, and its first tokens as rows."""

    key: Tensor
    value: Tensor
    own: Tensor
    flight: Flight


class HaloContext(KeySource):
    """What one layer's attention needs to work on a shard of a sequence; a `KeySource`.

    Every rank of the group must call as often as the others, in the same order.

    Args:
        group: the ranks over which the sequence is sharded, as a one-dimensional mesh (`mesh["cp"]`) or a group.
        lengths: tokens of each rank's shard; they may differ, and may be 0.
        pattern: of the layer.
        documents: positions where packed documents start, the first one 0; None is one document, or what
            `set_segments` says.

    Raises:
        ValueError: the number of lengths is not that of the ranks, or see `halo_plan`.

    Example::

        halo = HaloContext(mesh["cp"], lengths=[8192] * 4, pattern=pattern)
        out = halo.attention(query, key, value, gate=gate)  # of the shard

        key, value, segment_ids = halo.extend(key, value)  # or the exchange alone: [B, G, halo + T, D]
        out = pi_attention(query, key, value, pattern, gate=gate, segment_ids=segment_ids)

        started = halo.start(key, value)  # or with work of one's own while the keys are on their way
        key, value, segment_ids = halo.finish(started)
    """

    def __init__(
        self,
        group: DeviceMesh | ProcessGroup,
        lengths: Sequence[int],
        pattern: PiPattern,
        documents: Sequence[int] | None = None,
    ) -> None:
        self.group = group.get_group() if isinstance(group, DeviceMesh) else group
        ranks, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        if len(lengths) != ranks:
            raise ValueError(f"lengths has {len(lengths)} entries for {ranks} ranks: give the tokens of every shard.")
        starts = (0,) if documents is None else tuple(int(start) for start in documents)
        self.pattern = pattern
        self.plan = halo_plan(pattern, lengths, starts)
        self.halo = self.plan.halos[self.rank]
        positions = [*range(*self.halo.sinks), *range(self.halo.first, self.halo.last)]
        self._positions = torch.tensor(positions, dtype=torch.long)  # of the extended keys
        self._documents = starts
        self._first_at_home = self._rows_until_home()
        self._ways: dict[torch.device, Route] = {}
        self._ids: Tensor | None = None
        if len(starts) > 1:
            ids = torch.bucketize(torch.arange(self.plan.bounds[-1]), torch.tensor(starts), right=True)
            self._ids = ids.to(torch.int32)[None, self._positions]

    def position(self, cache: KeyValueCache | None = None) -> int:
        """Position of the shard's first token, whatever a cache holds."""
        return self.halo.own[0]

    @property
    def after(self) -> int:
        """Extended keys that follow the shard's last one; only bidirectional patterns have some."""
        return self.halo.last - self.halo.own[1]

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The rank's part of a tensor over the whole sequence."""
        return shard(x, self.plan.bounds[1:], self.rank, dim)

    def is_for(self, group: ProcessGroup, lengths: Sequence[int], pattern: PiPattern) -> bool:
        """Whether this object shards so, for this pattern and as one document."""
        ends = tuple(accumulate(lengths))
        same = self.group is group and self.pattern == pattern
        return same and self.plan.bounds[1:] == ends and self._documents == (0,)

    def set_segments(self, segment_ids: Tensor) -> None:
        """Packed documents that change from batch to batch, without a new plan: keys are exchanged as for one document.

        Args:
            segment_ids: [B or 1, S] int32 of the whole sequence, as in `pi_attention`.

        Raises:
            ValueError: the pattern has sinks, which lie where documents start: give `documents` then; or it is a ring;
                or the ids are not of the whole sequence.
        """
        total = self.plan.bounds[-1]
        if segment_ids.dim() != 2 or segment_ids.shape[1] != total:
            raise ValueError(
                f"segment_ids has shape {tuple(segment_ids.shape)}, but [B or 1, {total}] is needed: "
                "give those of the whole sequence to every rank, not of its shard."
            )
        if self.pattern.ring:
            raise ValueError("packed documents cannot share a ring: set ring=False.")
        if self.pattern.sinks:
            raise ValueError(
                f"segment_ids cannot tell where the sinks={self.pattern.sinks} of each document lie: give documents=."
            )
        self._way(segment_ids.device)  # now, not while a compiled model watches
        self._positions = self._positions.to(segment_ids.device)
        self._ids = segment_ids[:, self._positions]

    def extend(
        self, key: Tensor, value: Tensor, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the shard, [B, G, T, D], with those that its queries see on other ranks.

        One message in each direction. The result stands in the order of the sequence (a ring may begin anywhere) and
        is differentiable; gradients reach the rank that owns a key.

        Args:
            key: after rotary embedding with the positions of the whole sequence.
            value: like key.
            segment_ids: of a model's packed batch; this object was told the documents, which count here.

        Raises:
            ValueError: there are segments (packed documents, padding), but this object was told of none; or key and
                value are not those of the shard.
        """
        self._check_segments(segment_ids)
        self._check_shard(key, value)
        if torch.compiler.is_compiling() and value is key:  # Dynamo traces no function of one tensor given twice
            value = value.view_as(value)
        key, value = Extend.apply(key, value, self._way(key.device), self.group)
        return key, value, self._ids_for(key, slice(None))

    def start(self, key: Tensor, value: Tensor, tokens: int | None = None) -> Started:
        """`extend` in two parts, so that something else is computed while keys are on their way: this sends them.

        For eager mode; hand what is returned to `finish`. It also overlaps backward, with the work done on the `key`
        and `value` of what is returned.

        Args:
            key, value: as in `extend`.
            tokens: let `finish` return so many tokens of the shard beside those of others; all when None.

        Raises:
            ValueError: fewer than all tokens of a bidirectional pattern, whose halo follows them, too; or key and
                value are not those of the shard.
        """
        self._check_shard(key, value)
        if tokens is not None and tokens < key.shape[2] and self.after:
            raise ValueError(
                f"tokens={tokens} is less than the shard's {key.shape[2]}, but keys follow it: leave it out."
            )
        count = key.shape[2] if tokens is None else tokens
        flight = Flight(self._way(key.device), self.group, key, count)
        key, value, own = Start.apply(key, value, flight)
        return Started(key, value, own, flight)

    def finish(self, started: Started) -> tuple[Tensor, Tensor, Tensor | None]:
        """Wait for the keys of others; extended keys, values and segment ids, as `extend` returns them."""
        rows = Finish.apply(started.own, started.flight)
        return *unpacked(rows, started.key), self._ids_for(started.key, slice(0, rows.shape[0]))

    def attend(
        self,
        operator: Operator,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None,
        segment_ids: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        once: bool = False,
    ) -> Tensor:
        """The operator for the shard's queries [B, H, T, D] over all keys that they see; gate logits [B, H, T].

        A `cache` gets what later queries see of the whole sequence, on every rank.

        In eager mode, queries whose keys are all at home are attended to while the others' keys are on their way,
        unless the operator is to be called `once`, or the shard is short.

        Raises:
            ValueError: a cache is to be filled where gradients are wanted, which it would keep on one rank alone; or
                there are segments that this object was not told of; or tensors are not those of the shard.
        """
        self._check_segments(segment_ids)
        self._check_shard(key, value, query)
        if cache is not None:
            if torch.is_grad_enabled():
                raise ValueError("a sharded sequence fills a cache without gradients only: pass use_cache=False.")
            cache.resume(*self.kept(key, value))
        query, key, value = as_autocast(query, key, value)  # an empty shard's output has the dtype of others, too
        tokens, at_home = query.shape[2], self._first_at_home
        once = once or torch.compiler.is_compiling() or (query.is_cuda and query.numel() < SHORT)
        if once or at_home is None or at_home >= tokens:
            key, value, ids = self.extend(key, value, segment_ids)
            return _before_others(operator, query, key, value, gate, ids, self.after)
        started = self.start(key, value, at_home)
        own = slice(self.halo.length - tokens, None)
        parts = [at_home, tokens - at_home]
        queries = query.split(parts, dim=2)
        gates = (None, None) if gate is None else gate.split(parts, dim=2)
        interior = operator(queries[1], started.key, started.value, gates[1], self._ids_for(key, own))
        key, value, ids = self.finish(started)
        border = _before_others(operator, queries[0], key, value, gates[0], ids, 0)
        return torch.cat([border, interior], dim=2)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, *, gate: Tensor | None = None, fusion: Fusion = "gate"
    ) -> Tensor:
        """`pi_attention` of the shard's queries [B, H, T, D] over all keys that they see; gate logits [B, H, T]."""

        def operator(query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, ids: Tensor | None) -> Tensor:
            return pi_attention(query, key, value, self.pattern, gate=gate, fusion=fusion, segment_ids=ids)

        return self.attend(operator, query, key, value, gate)

    def kept(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        """What a decoding cache keeps after the whole sequence, [B, G, kept, D], on every rank, and the length S."""
        start, end = self.halo.own
        total, reach = self.plan.bounds[-1], self.pattern.reach
        last = total if reach is None else min(total, reach)
        positions = torch.tensor([*range(min(self.pattern.sinks, total - last)), *range(total - last, total)])
        places = ((positions >= start) & (positions < end)).nonzero()[:, 0]
        rows = (positions[places] - start).to(key.device)
        kept = key.new_zeros(2, *key.shape[:2], len(positions), key.shape[3])
        kept[:, :, :, places.to(key.device)] = torch.stack([key, value])[:, :, :, rows]
        dist.all_reduce(kept, group=self.group)  # all but one are zero
        return kept[0], kept[1], total

    def _way(self, device: torch.device) -> Route:
        if device not in self._ways:
            self._ways[device] = route(self.plan, self.rank, device)
        return self._ways[device]

    def _ids_for(self, key: Tensor, rows: slice) -> Tensor | None:
        return None if self._ids is None else self._ids.to(key.device)[:, rows].expand(key.shape[0], -1)

    def check_batch(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Refuse what no rank can tell from its shard alone.

        Raises:
            ValueError: the batch has padding; or the shard's first position is that of a document that began after the
                whole sequence, and this object was told of one document.
        """
        if attention_mask is not None and have_values(attention_mask) and bool((attention_mask == 0).any()):
            raise ValueError(
                "attention_mask has padding, which a sharded sequence does not know: pad no rows, and leave it out."
            )
        if self._ids is not None or position_ids is None or not position_ids.shape[1] or not have_values(position_ids):
            return
        if int(position_ids[:, 0].min()) < self.position():
            raise ValueError(
                f"position_ids begin with {position_ids[:, 0].tolist()[:4]} in the shard of rank {self.rank}, which "
                f"begins at {self.position()}: give positions of the whole sequence, and name packed documents by "
                "documents= or segment_ids=."
            )

    def _check_segments(self, segment_ids: Tensor | None) -> None:
        if segment_ids is not None and self._ids is None:
            raise ValueError(
                "the batch has padding or packed documents, which a sharded sequence knows by documents= alone: "
                "give their starts to HaloContext or attach, and pad no rows."
            )

    def _check_shard(self, key: Tensor, value: Tensor, query: Tensor | None = None) -> None:
        """Raise ValueError, before any message, for tensors that are not of this rank's shard."""
        (start, end), rank = self.halo.own, self.rank
        for name, x in (("key", key), ("query", key if query is None else query)):
            if x.dim() != 4 or x.shape[2] != end - start:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}, but the shard of rank {rank} has {end - start} tokens: give "
                    "[B, heads, tokens, D] of the shard, cut by `shard`, or the lengths of these shards."
                )
        if value.shape != key.shape or value.dtype != key.dtype:
            raise ValueError(
                f"key {tuple(key.shape)}, {key.dtype} and value {tuple(value.shape)}, {value.dtype} must have one "
                "shape [B, G, T, D] and one dtype: they travel in one message."
            )

    def _rows_until_home(self) -> int | None:
        """The first token of the shard from which on no query sees another rank's key; None where this is not known."""
        (start, end), documents = self.halo.own, self._documents
        if not self.pattern.causal:
            return None
        if not self.halo.rows:
            return 0
        following = bisect_right(documents, start)
        new = documents[following] if following < len(documents) else end  # later queries see no earlier document
        near = end if self.pattern.sinks or self.pattern.reach is None else start + self.pattern.reach
        return min(new, near, end) - start


def _before_others(
    operator: Operator,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    segment_ids: Tensor | None,
    after: int,
) -> Tensor:
    """The operator for queries [B, H, T, D] that `after` keys follow, though it has its queries at the end.

    T may be 0, for an empty shard, whose keys still need their gradients.
    """
    tokens = query.shape[2]
    if not tokens:
        none = query + value[:, :, :0].repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return none if gate is None else none + gate[..., None].to(none.dtype)  # zero gradients, not missing ones
    if after:
        query = F.pad(query, (0, 0, 0, after))
        gate = None if gate is None else F.pad(gate, (0, after))
    return operator(query, key, value, gate, segment_ids)[:, :, :tokens]
