"""A rank that is silent ends the one before it, which says so, whatever its main thread waits for."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
import torch.distributed as dist

from pi_attention.training.heartbeat import watched

PROGRAM = """
import sys, time
from pi_attention.training.heartbeat import watched
rank, ranks, seconds = map(int, sys.argv[1:])
with watched(2, rank, ranks):
    print("watching", flush=True)
    time.sleep(seconds)
print("over", flush=True)
"""


def new_store():
    """A store that is not a rank's, as torchrun has one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


@contextmanager
def watching(store, ranks, seconds):
    """Ranks that watch one another for so many seconds."""
    environment = os.environ | {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(rank), str(ranks), str(seconds)], env=environment, **pipes)
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "watching\n"
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.communicate()


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_silent_rank_is_named_and_ends_the_one_before_it(how):
    store = new_store()
    with watching(store, 3, 60) as processes:
        time.sleep(1)
        processes[2].send_signal(how)
        _, said = processes[1].communicate(timeout=30)
        assert processes[1].returncode == 1
        assert "rank 1 failed, and not all ranks answer: rank 2 was silent for 2 s." in said


def test_ranks_that_answer_live_on_and_end_quietly():
    store = new_store()
    with watching(store, 2, 5) as processes:
        for process in processes:
            out, said = process.communicate(timeout=30)
            assert process.returncode == 0 and out == "over\n" and not said


def test_a_store_that_is_gone_ends_nothing():
    store = new_store()
    with watching(store, 2, 5) as processes:
        del store
        for process in processes:
            assert process.communicate(timeout=30)[0] == "over\n" and process.returncode == 0


def test_a_single_rank_needs_no_store():
    with watched(1, 0, 1):
        pass
