"""Times and peaks of what all ranks do together, with their messages and without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

MESSAGES = (
    "all_to_all_single",
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
)
"""Of torch.distributed; FSDP2 calls the older or the newer names, by the version."""


class _Sent:
    """A message that has arrived."""

    def wait(self) -> None:
        """Return at once."""


@contextmanager
def silenced() -> Iterator[None]:
    """Send nothing: what would have arrived is what the memory held. Tensor parallelism still talks."""

    def nothing(*args: Any, **kwargs: Any) -> _Sent:
        return _Sent()

    def received(rows: Tensor, counts: list[int], *args: Any) -> Tensor:
        return rows.new_empty(sum(counts), *rows.shape[1:])

    with ExitStack() as stack:
        for name in MESSAGES:
            if hasattr(dist, name):
                stack.enter_context(patch.object(dist, name, nothing))
        stack.enter_context(patch.object(dist, "batch_isend_irecv", lambda operations: []))
        stack.enter_context(patch.object(collectives, "all_to_all_single", received))
        yield


def slowest(seconds: float, device: torch.device) -> float:
    """The largest of all ranks' numbers."""
    found = torch.tensor([seconds], device=device, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """One call, begun by all ranks together, on the slowest of them."""
    slowest(0.0, device)
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return slowest(time.perf_counter() - begun, device)


def measured(run: Callable[[], Any], device: torch.device, budget: float, most: int = 7) -> dict[str, float]:
    """Median seconds of the slowest rank, how many calls that is the median of, and the fullest rank's peak in GiB.

    After a warm-up, in which kernels may be compiled, at least two calls; one where it took over four budgets.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    least = 1 if seconds_of(run, device) > 4 * budget else 2
    times: list[float] = []
    while len(times) < least or (len(times) < most and sum(times) < budget):
        times.append(seconds_of(run, device))
    peak = slowest(torch.cuda.max_memory_allocated() / 2**30, device) if cuda else 0.0
    return {"seconds": statistics.median(times), "repeats": len(times), "peak GiB": peak}
