"""One message of keys and values to whoever needs them, and the way back for their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed import ProcessGroup

from pi_attention.distributed.plan import HaloPlan, Range


def _index(ranges: list[Range], offset: int) -> list[int]:
    return [position - offset for a, b in ranges for position in range(a, b)]


@dataclass(frozen=True)
class Route:
    """What one rank sends and receives, as row numbers; made once for a plan.

    Args:
        sent: rows of the shard, by receiving rank.
        placed: rows of the extended keys where what is received goes, by sending rank.
        own: first row of the shard among the extended keys.
        length: extended rows.
        tokens: rows of the shard.
    """

    sent: tuple[tuple[int, ...], ...]
    placed: tuple[tuple[int, ...], ...]
    own: int
    length: int
    tokens: int

    @property
    def rows_sent(self) -> list[int]:
        """Rows to each rank."""
        return [len(rows) for rows in self.sent]

    @property
    def rows_received(self) -> list[int]:
        """Rows from each rank."""
        return [len(rows) for rows in self.placed]


def route(plan: HaloPlan, rank: int) -> Route:
    """The rows that `rank` sends and receives by a plan."""
    halo, ranks = plan.halos[rank], range(len(plan.halos))
    sent = tuple(tuple(_index(plan.received(other, rank), halo.own[0])) for other in ranks)
    placed = tuple(tuple(map(halo.place, _index(plan.received(rank, other), 0))) for other in ranks)
    return Route(sent, placed, halo.place(halo.own[0]), halo.length, halo.own[1] - halo.own[0])


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
        sent = torch.tensor([row for part in way.sent for row in part], dtype=torch.long, device=rows.device)
        received = _all_to_all(rows[sent], way.rows_received, way.rows_sent, group)
        placed = torch.tensor([row for part in way.placed for row in part], dtype=torch.long, device=rows.device)
        extended = rows.new_zeros(way.length, *rows.shape[1:])
        extended[placed] = received
        extended[way.own : way.own + way.tokens] = rows
        return extended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        way = ctx.way
        placed = torch.tensor([row for part in way.placed for row in part], dtype=torch.long, device=grad.device)
        returned = _all_to_all(grad[placed], way.rows_sent, way.rows_received, ctx.group)
        total = grad[way.own : way.own + way.tokens].clone()
        for rows, part in zip(way.sent, returned.split(way.rows_sent), strict=True):
            if rows:
                total[list(rows)] += part  # a rank asks for a row once, so no two additions meet
        return total, None, None
