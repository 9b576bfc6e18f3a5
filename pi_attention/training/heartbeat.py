"""Who is silent: each rank tells that it lives, and ends when the next one does not.

NCCL cannot say which rank keeps the others waiting, and a process that waits for a GPU raises nothing. So a thread of
each rank counts in the store of the process group, and watches the count of the next rank.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

from torch.distributed import TCPStore  # type: ignore[attr-defined]

BEATS = 5
"""Of a rank, within the time after which it counts as silent."""


@contextmanager
def watched(silence: float, rank: int, ranks: int) -> Iterator[None]:
    """End this process, with a line on stderr, once the next rank has been silent for so many seconds.

    Args:
        silence: seconds.
        rank, ranks: of this process, and their number. torchrun tells where the store is.
    """
    if ranks == 1:
        yield
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=max(silence, 10)))
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(store, silence, rank, ranks, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=silence)


def _watch(store: TCPStore, silence: float, rank: int, ranks: int, over: threading.Event) -> None:
    following, heard, since = (rank + 1) % ranks, -1, time.monotonic()
    room = f"pi_attention/heartbeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        while not over.wait(min(1.0, silence / BEATS)):
            store.add(f"{room}/{rank}", 1)
            beats = store.add(f"{room}/{following}", 0)
            if beats != heard:
                heard, since = beats, time.monotonic()
            elif time.monotonic() - since > silence:
                _end(rank, following, silence)
    except RuntimeError:
        return  # the store is gone, and so is who held it: torchrun, or the first rank, whose end the others notice


def _end(rank: int, silent: int, seconds: float) -> NoReturn:
    """By `os._exit`: the main thread may wait for a GPU, and would not see an exception."""
    print(f"rank {rank} failed, and not all ranks answer: rank {silent} was silent for {seconds:g} s.", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
