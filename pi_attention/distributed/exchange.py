"""One message of keys and values to whoever needs them, and the way back for their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed import ProcessGroup

from pi_attention.distributed.plan import HaloPlan, Range


@dataclass(frozen=True)
class Route:
    """What one rank sends and receives, as row numbers; made once for a plan and a device.

    Args:
        sent: rows of the shard, for each receiving rank.
        placed: rows of the extended keys where what is received goes, in the order of the sending ranks.
        received: how many rows come from each rank.
        own: first row of the shard among the extended keys.
        length: extended rows.
        tokens: rows of the shard.
    """

    sent: tuple[Tensor, ...]
    placed: Tensor
    received: list[int]
    own: int
    length: int
    tokens: int


def route(plan: HaloPlan, rank: int, device: torch.device | str = "cpu") -> Route:
    """The rows that `rank` sends and receives by a plan."""
    halo, ranks = plan.halos[rank], range(len(plan.halos))

    def rows(ranges: list[Range]) -> list[int]:
        return [position for a, b in ranges for position in range(a, b)]

    def tensor(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=device)

    sent = tuple(tensor([row - halo.own[0] for row in rows(plan.received(other, rank))]) for other in ranks)
    needed = [rows(plan.received(rank, other)) for other in ranks]
    placed = tensor([halo.place(row) for part in needed for row in part])
    received = [len(part) for part in needed]
    return Route(sent, placed, received, halo.place(halo.own[0]), halo.length, halo.own[1] - halo.own[0])


def _all_to_all(rows: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    exchanged = collectives.all_to_all_single(rows.contiguous(), received, sent, group)
    return torch.ops._c10d_functional.wait_tensor(exchanged)


class Extend(torch.autograd.Function):
    """Rows [tokens, …] of the shard to extended rows [length, …]; rows that nobody needs are zero.

    Backward sends the gradients of received rows to their owners, who add them in the order of the ranks, so the
    result is the same in every run.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Route, group: ProcessGroup) -> Tensor:
        ctx.way, ctx.group = way, group
        extended = rows.new_zeros(way.length, *rows.shape[1:])
        extended[way.placed] = _all_to_all(rows[torch.cat(way.sent)], way.received, list(map(len, way.sent)), group)
        extended[way.own : way.own + way.tokens] = rows
        return extended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        way = ctx.way
        counts = list(map(len, way.sent))
        returned = _all_to_all(grad[way.placed], counts, way.received, ctx.group)
        total = grad[way.own : way.own + way.tokens].clone()
        for rows, part in zip(way.sent, returned.split(counts), strict=True):
            total[rows] += part  # a rank asks for a row once, so no two additions meet
        return total, None, None
