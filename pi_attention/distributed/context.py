"""Context parallelism: a sequence sharded over ranks, each of which sees the keys of its neighbours that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from pi_attention.distributed.exchange import Extend, Route, route
from pi_attention.distributed.plan import halo_plan
from pi_attention.nn.attention import PiAttention, before_others
from pi_attention.ops.api import Fusion, pi_attention
from pi_attention.pattern import PiPattern


def shard(x: Tensor, ends: Sequence[int], rank: int, dim: int = 1) -> Tensor:
    """A rank's part of a tensor over the whole sequence; `ends` are where the shards of all ranks end."""
    start = ends[rank - 1] if rank else 0
    return x.narrow(dim, start, ends[rank] - start)


class HaloContext:
    """What one layer's attention needs to work on a shard of a sequence; a `KeyValueCache` of the layer.

    Every rank of the group must call `extend` as often as the others, in the same order.

    Args:
        group: the ranks over which the sequence is sharded, as a one-dimensional mesh (`mesh["cp"]`) or a group.
        lengths: tokens of each rank's shard; they may differ, and may be 0.
        pattern: of the layer.
        documents: positions where packed documents start, the first one 0; None is one document.

    Raises:
        ValueError: the number of lengths is not that of the ranks, or see `halo_plan`.

    Example::

        halo = HaloContext(mesh["cp"], lengths=[8192] * 4, pattern=pattern)
        key, value, segment_ids = halo.extend(key, value)  # [B, G, halo + T, D]
        out = pi_attention(query, key, value, pattern, segment_ids=segment_ids)
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
        self._ways: dict[torch.device, Route] = {}
        self._ids = self._segment_ids(starts)

    @property
    def length(self) -> int:
        """Position of the shard's first token."""
        return self.halo.own[0]

    @property
    def after(self) -> int:
        """Extended keys that follow the shard's last one; only bidirectional patterns have some."""
        return self.halo.last - self.halo.own[1]

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The rank's part of a tensor over the whole sequence."""
        return shard(x, self.plan.bounds[1:], self.rank, dim)

    def extend(
        self, key: Tensor, value: Tensor, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the shard, [B, G, T, D], with those that its queries see on other ranks.

        One message in each direction. The result stands in the order of the sequence and is differentiable; gradients
        reach the rank that owns a key.

        Args:
            key: after rotary embedding with the positions of the whole sequence.
            value: like key.
            segment_ids: of a model's packed batch; the constructor was told the documents, which count here.

        Raises:
            ValueError: there are segments (packed documents, padding), but the constructor was told of none.
        """
        if segment_ids is not None and self._ids is None:
            raise ValueError(
                "the batch has padding or packed documents, which a sharded sequence knows by documents= alone: "
                "give their starts to HaloContext or attach, and pad no rows."
            )
        if key.device not in self._ways:
            self._ways[key.device] = route(self.plan, self.rank, key.device)
        batch, groups, tokens, dim = key.shape
        rows = torch.cat([key, value], dim=-1).permute(2, 0, 1, 3).reshape(tokens, batch * groups * 2 * dim)
        rows = Extend.apply(rows, self._ways[key.device], self.group)
        key, value = rows.view(-1, batch, groups, 2 * dim).permute(1, 2, 0, 3).split(dim, dim=-1)
        ids = None if self._ids is None else self._ids.to(key.device).expand(batch, -1)
        return key, value, ids

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, *, gate: Tensor | None = None, fusion: Fusion = "gate"
    ) -> Tensor:
        """`pi_attention` of the shard's queries [B, H, T, D] over the extended keys; gate logits [B, H, T]."""
        key, value, ids = self.extend(key, value)

        def attend(query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None) -> Tensor:
            return pi_attention(query, key, value, self.pattern, gate=gate, fusion=fusion, segment_ids=ids)

        return before_others(attend, query, key, value, gate, self.after)

    def _segment_ids(self, documents: tuple[int, ...]) -> Tensor | None:
        """Which document each extended key belongs to, [1, keys]; None for one document that starts there."""
        halo = self.halo
        if len(documents) == 1:
            return None
        positions = torch.tensor([*range(*halo.sinks), *range(halo.first, halo.last)])
        ids = torch.bucketize(positions, torch.tensor(documents), right=True).to(torch.int32)
        return ids[None]


def attach(model: nn.Module, group: DeviceMesh | ProcessGroup, lengths: Sequence[int], documents: Any = None) -> None:
    """Let every `PiAttention` of a model work on shards of `lengths` tokens; the model's code stays single-device.

    Give the model its shard of the input ids and of the positions (`position_ids`) and `use_cache=False`, and shift
    labels before sharding them: the next token of a shard's last one lies on another rank.

    Args:
        model: with `PiAttention` layers, a `PiForCausalLM` for instance.
        group, lengths, documents: see `HaloContext`; layers of one pattern share a plan.

    Raises:
        ValueError: the model has no such layer (a converted model has none).
    """
    layers = [module for module in model.modules() if isinstance(module, PiAttention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PiAttention layer: each rank would attend to its shard alone.")
    contexts: dict[PiPattern, HaloContext] = {}
    for layer in layers:
        if layer.pattern not in contexts:
            contexts[layer.pattern] = HaloContext(group, lengths, layer.pattern, documents)
        layer.halo = contexts[layer.pattern]


def detach(model: nn.Module) -> None:
    """Undo `attach`: every layer sees the sequence that it is given, and no more."""
    for module in model.modules():
        if isinstance(module, PiAttention):
            module.halo = None
