"""The processes of a run: one, or the ranks that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pi_attention.accelerator import best_device
from pi_attention.distributed.layout import Layout
from pi_attention.training.heartbeat import watched

ANSWER = 10
"""Seconds that a rank has to say that it lives, once an exchange has failed."""


def rank_and_ranks() -> tuple[int, int] | None:
    """The number of this process and how many torchrun started; None where it did not."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def layout_of(parallel: str) -> Layout:
    """The layout that `--parallel` names; when it is empty, a data-parallel group for each rank of torchrun.

    Raises:
        ValueError: it needs several ranks, and the process was not started by torchrun.
    """
    started = rank_and_ranks()
    layout = Layout.parse(parallel) if parallel else Layout(dp=1 if started is None else started[1])
    if layout.ranks > 1 and started is None:
        raise ValueError(
            f"parallel={parallel!r} needs several processes: torchrun --nproc-per-node {layout.ranks} "
            "-m pi_attention.cli train --parallel …"
        )
    return layout


def device_of_process() -> torch.device:
    """The accelerator of this process, or the CPU; of a rank, the GPU with its number on this host."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if rank_and_ranks() is not None:
        return torch.device("cpu")  # gloo's
    return best_device()


@contextmanager
def joined(layout: Layout, patience: int, device: torch.device) -> Iterator[DeviceMesh | None]:
    """Join the process group that torchrun describes: the mesh of the layout; None for a process of its own.

    Args:
        layout: of the ranks.
        patience: seconds that an exchange may take, and that a rank may be silent.
        device: of this rank.

    Raises:
        ValueError: another number of ranks was started.
        RuntimeError: an exchange failed; the message names the ranks which do not answer.
    """
    if rank_and_ranks() is None:
        yield None
        return
    nccl = device.type == "cuda"
    if nccl:
        torch.cuda.set_device(device)
    later = patience + 2 * ANSWER
    dist.init_process_group("nccl" if nccl else "gloo", timeout=timedelta(seconds=later if nccl else patience))
    # gloo raises, and the missing are asked for; on NCCL, silence ends the run before NCCL does, which names nobody
    silence = patience if nccl else later
    with watched(silence, dist.get_rank(), dist.get_world_size()), naming_the_missing():
        yield layout.mesh(device.type)
        dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()


@contextmanager
def naming_the_missing() -> Iterator[None]:
    """Turn a failed exchange into an error that names the ranks which do not answer.

    Raises:
        RuntimeError: an exchange failed, or took longer than the process group's timeout.
    """
    watch = dist.new_group(backend="gloo", timeout=timedelta(seconds=ANSWER))
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        try:
            dist.monitored_barrier(watch, timedelta(seconds=ANSWER), wait_all_ranks=True)
        except RuntimeError as missing:
            raise RuntimeError(f"rank {dist.get_rank()} failed, and not all ranks answer: {missing}") from error
        raise
