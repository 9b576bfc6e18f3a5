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
        rows: all of them.
        counts: how many each rank receives.
        placed: rows of the extended keys where what is received goes, in the order of the sending ranks.
        received: how many rows come from each rank.
        own: first row of the shard among the extended keys.
        length: extended rows.
        tokens: rows of the shard.
    """

    sent: tuple[Tensor, ...]
    rows: Tensor
    counts: list[int]
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
    start, end = halo.own
    counts = list(map(len, sent))
    return Route(sent, torch.cat(sent), counts, placed, received, halo.place(start), halo.length, end - start)


def _all_to_all(rows: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    exchanged = collectives.all_to_all_single(rows.contiguous(), received, sent, group)
    return torch.ops._c10d_functional.wait_tensor(exchanged)


def _refuse_second_derivatives() -> None:
    """Raise, on every rank and before any message, in a backward pass with create_graph=True."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "a sharded sequence has no second derivatives (create_graph=True): compute them on one process."
        )


class Extend(torch.autograd.Function):
    """Keys and values [B, G, T, D] of the shard to extended ones [B, G, length, D]; rows that nobody needs are zero.

    Backward sends the gradients of received rows to their owners, who add them in the order of the ranks, so the
    result is the same in every run.
    """

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, way: Route, group: ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.way, ctx.group = way, group
        end = way.own + way.tokens
        message = packed(key[:, :, way.rows], value[:, :, way.rows])
        arrived = _all_to_all(message, way.received, way.counts, group)
        extended = [x.new_empty(*x.shape[:2], way.length, x.shape[3]) for x in (key, value)]
        for whole, own, others in zip(extended, (key, value), unpacked(arrived, key), strict=True):
            whole[:, :, : way.own], whole[:, :, end:] = 0, 0
            whole[:, :, way.own : end] = own
            whole[:, :, way.placed] = others
        return extended[0], extended[1]

    @staticmethod
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor, Tensor, None, None]:
        _refuse_second_derivatives()
        way: Route = ctx.way
        end = way.own + way.tokens
        message = packed(grad_key[:, :, way.placed], grad_value[:, :, way.placed])
        returned = _all_to_all(message, way.counts, way.received, ctx.group)
        totals = grad_key[:, :, way.own : end].clone(), grad_value[:, :, way.own : end].clone()
        add_returned(totals, returned, way)
        return *totals, None, None


def add_returned(totals: tuple[Tensor, Tensor], returned: Tensor, way: Route) -> None:
    """Add what came back to the gradients of the shard's keys and values, in the order of the ranks."""
    for rows, returned_rows in zip(way.sent, returned.split(way.counts), strict=True):
        for total, part in zip(totals, unpacked(returned_rows, totals[0]), strict=True):
            total[:, :, rows] += part  # a rank asks for a row once, so no two additions meet


def packed(key: Tensor, value: Tensor) -> Tensor:
    """Keys and values [B, G, T, D] as one row a token."""
    return torch.cat([key, value], dim=-1).permute(2, 0, 1, 3).flatten(1)


def unpacked(rows: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, rows, D] of rows; `like` has the other sizes."""
    batch, groups, _, dim = like.shape
    key, value = rows.view(rows.shape[0], batch, groups, 2 * dim).permute(1, 2, 0, 3).split(dim, dim=-1)
    return key, value


class Flight:
    """One layer's message on its way, and later that of its gradients: work that does not need it can go on.

    Args:
        way: of the message.
        group: the ranks.
        like: the keys [B, G, T, D].
        tokens: of the shard, those whose keys `Finish` returns too.
    """

    def __init__(self, way: Route, group: ProcessGroup, like: Tensor, tokens: int) -> None:
        self.way, self.group, self.tokens = way, group, tokens
        self.like = like.new_empty(*like.shape[:2], 0, like.shape[3])  # the sizes without the memory
        self._message: tuple[Tensor, Tensor, Any] | None = None

    def depart(self, rows: Tensor, received: list[int], sent: list[int]) -> None:
        """Send rows [sent, …] without waiting."""
        rows = rows.contiguous()
        arriving = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(arriving, rows, received, sent, self.group, async_op=True)
        self._message = rows, arriving, work  # both must live until they have been sent

    @property
    def departed(self) -> bool:
        """Whether a message is on its way."""
        return self._message is not None

    def land(self) -> Tensor:
        """Wait for the rows that were sent to this rank."""
        if self._message is None:
            raise RuntimeError("no message is on its way: hand to `finish` what `start` returned, once.")
        (_, arriving, work), self._message = self._message, None
        work.wait()
        return arriving


class Start(torch.autograd.Function):
    """Keys and values of the shard, unchanged, and the first `flight.tokens` of them as rows; others' needs depart.

    Only these rows are copied. Backward adds the gradients that come back. Made before the work that is to overlap, so
    that in the backward pass its turn comes after that of this work.
    """

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, flight: Flight) -> tuple[Tensor, Tensor, Tensor]:
        ctx.flight = flight
        way = flight.way
        flight.depart(packed(key[:, :, way.rows], value[:, :, way.rows]), way.received, way.counts)
        own = slice(0, flight.tokens)
        return key.view_as(key), value.view_as(value), packed(key[:, :, own], value[:, :, own])

    @staticmethod
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor, grad_own: Tensor) -> tuple[Tensor, Tensor, None]:
        _refuse_second_derivatives()
        flight: Flight = ctx.flight
        if not flight.departed:  # nothing uses what `finish` returned; the other ranks wait all the same
            none = grad_own.new_zeros(len(flight.way.placed), *grad_own.shape[1:])
            flight.depart(none, flight.way.counts, flight.way.received)
        totals = grad_key.clone(), grad_value.clone()
        for total, part in zip(totals, unpacked(grad_own, flight.like), strict=True):
            total[:, :, : flight.tokens] += part
        add_returned(totals, flight.land(), flight.way)
        return *totals, None


class Finish(torch.autograd.Function):
    """The extended rows up to the last of the shard's `own`, once the others' have landed; backward sends gradients."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, flight: Flight) -> Tensor:
        way = flight.way
        ctx.flight = flight
        extended = own.new_zeros(way.length - way.tokens + len(own), *own.shape[1:])
        extended[way.placed] = flight.land()
        extended[way.own : way.own + len(own)] = own
        return extended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _refuse_second_derivatives()
        flight, way = ctx.flight, ctx.flight.way
        flight.depart(grad[way.placed], way.counts, way.received)
        return grad[way.own : way.own + flight.tokens], None
