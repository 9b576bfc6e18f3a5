"""Three ways for the queries of a shard to reach the keys of other ranks, each a `KeySource` of an attention layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from benchmarks import ring_attention
from benchmarks.ring_attention import Block, RingAttention, chunks_of
from pi_attention.distributed import HaloContext, attach
from pi_attention.nn import PiAttention
from pi_attention.nn.sources import KeySource, Operator
from pi_attention.pattern import PiPattern

HALO, GATHER, RING = "halo", "all-gather", "dense ring"


def tokens_of(way: str, total: int, rank: int, ranks: int) -> Tensor:
    """Positions that a rank holds: a contiguous part, or of the ring two chunks, one from either end."""
    if way != RING:
        return torch.arange(total // ranks) + rank * (total // ranks)
    length = total // (2 * ranks)
    return torch.cat([torch.arange(length) + length * chunk for chunk in chunks_of(rank, ranks)])


class Gather(torch.autograd.Function):
    """Rows [tokens, …] of every rank in order; the gradients are summed and scattered."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        every = rows.new_empty(dist.get_world_size(group) * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(every, rows.contiguous(), group)
        return every

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(len(grad) // dist.get_world_size(ctx.group), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None


class GatherContext(KeySource):
    """Every key to every rank, then those up to its own."""

    def __init__(self, group: ProcessGroup, tokens: int) -> None:
        self.group, self.start, self.end = group, dist.get_rank(group) * tokens, (dist.get_rank(group) + 1) * tokens

    def position(self, cache: None = None) -> int:
        """Position of the shard's first token."""
        return self.start

    def attend(
        self, operator: Operator, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, *_: Any, **__: Any
    ) -> Tensor:
        """The operator for the shard's queries [B, H, T, D] over all keys up to the shard's last."""
        every = (Gather.apply(x.permute(2, 0, 1, 3), self.group).permute(1, 2, 0, 3) for x in (key, value))
        return operator(query, *(x[:, :, : self.end] for x in every), gate, None)


class RingContext(KeySource):
    """Dense causal attention; a rank holds two chunks. The operator is not asked."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def position(self, cache: None = None) -> int:
        """Positions come from elsewhere: a rank's chunks are not neighbours."""
        return 0

    def attend(self, operator: Operator, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attention of the rank's queries [B, H, T, D] to every earlier key of the sequence."""
        return RingAttention.apply(query, key, value, self.group)


def context_of(way: str, group: ProcessGroup, tokens: int, pattern: PiPattern) -> Any:
    """What a layer of this pattern attends with, on a shard of so many tokens."""
    if way == HALO:
        return HaloContext(group, [tokens] * dist.get_world_size(group), pattern)
    return GatherContext(group, tokens) if way == GATHER else RingContext(group)


def spread(model: nn.Module, way: str, group: ProcessGroup, tokens: int) -> None:
    """Let every layer of a model attend in this way."""
    if way == HALO:
        attach(model, group, [tokens] * dist.get_world_size(group))
        return
    for module in model.modules():
        if isinstance(module, PiAttention):
            module.source = context_of(way, group, tokens, module.pattern)


@contextmanager
def hollow_ring() -> Iterator[None]:
    """Dense attention's memory without its products, for contexts whose products would take minutes."""

    def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Block:
        return torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=torch.float32)

    def attend_backward(grad: Tensor, query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        sums = torch.empty_like(query, dtype=torch.float32)  # as the kernel has
        del sums
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(key)

    with (
        patch.object(ring_attention, "attend", attend),
        patch.object(ring_attention, "attend_backward", attend_backward),
    ):
        yield
