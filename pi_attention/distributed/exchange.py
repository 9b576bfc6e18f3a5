"""One message of keys and values to whoever needs them, and the way back for their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
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


class Flight:
    """One layer's message on its way, and later that of its gradients: work that does not need it can go on."""

    def __init__(self, way: Route, group: ProcessGroup) -> None:
        self.way, self.group = way, group
        self.counts = list(map(len, way.sent))

    def depart(self, rows: Tensor, received: list[int], sent: list[int]) -> None:
        """Send rows [sent, …] without waiting."""
        self._rows = rows.contiguous()  # must live until it has been sent
        self._arriving = rows.new_empty(sum(received), *rows.shape[1:])
        self._work = dist.all_to_all_single(self._arriving, self._rows, received, sent, self.group, async_op=True)

    def land(self) -> Tensor:
        """Wait for the rows that were sent to this rank."""
        assert self._work is not None
        self._work.wait()
        return self._arriving


class Start(torch.autograd.Function):
    """Rows [tokens, …] of the shard, unchanged; those that others need depart. Backward adds what comes back for them.

    Made before the work that is to overlap, so that in the backward pass its turn comes after that of this work.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.depart(rows[torch.cat(flight.way.sent)], flight.way.received, flight.counts)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight, total = ctx.flight, grad.clone()
        for rows, part in zip(flight.way.sent, flight.land().split(flight.counts), strict=True):
            total[rows] += part  # a rank asks for a row once, so no two additions meet
        return total, None


class Finish(torch.autograd.Function):
    """The extended rows up to the `count`-th of the shard, once the others' have landed; backward sends gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: int, flight: Flight) -> Tensor:
        way = flight.way
        ctx.flight, ctx.count, ctx.tokens = flight, count, len(rows)
        extended = rows.new_zeros(way.own + count, *rows.shape[1:])
        extended[way.placed] = flight.land()
        extended[way.own :] = rows[:count]
        return extended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        flight, way = ctx.flight, ctx.flight.way
        flight.depart(grad[way.placed], flight.counts, way.received)
        own = grad.new_zeros(ctx.tokens, *grad.shape[1:])
        own[: ctx.count] = grad[way.own :]
        return own, None, None
