"""The process: an address, signals, and uvicorn."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from types import FrameType

import uvicorn
from starlette.applications import Starlette

GRACE = 10
"""Seconds that running requests have to end after a signal."""
LOCAL = ["localhost", "127.0.0.1", "[::1]"]


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address.

    Raises:
        ValueError: it is no address.
    """
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        raise ValueError(f"host={host!r} is no IP address: give one, such as 127.0.0.1 or 0.0.0.0.") from None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes any that is free.

    Raises:
        ValueError: the address cannot be taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(
            f"port={port} of host={host!r} cannot be taken: {error.strerror}. Give another one."
        ) from error


@contextmanager
def ending_at_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process with the code 0 as long as `serve` does not, as while the model is loaded."""
    usual = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


class _Server(uvicorn.Server):
    """Tells the clients that still wait after a while, where uvicorn would drop them."""

    def __init__(self, app: Starlette, stop: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level="error", access_log=False, lifespan="off", timeout_graceful_shutdown=2 * GRACE
            )
        )
        self._stop = stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As of uvicorn, which would raise SIGTERM again at the end, and so end with its code.

        A second signal ends what runs at once, where uvicorn would drop it with a traceback.
        """
        if self.should_exit:
            asyncio.get_running_loop().call_soon_threadsafe(self._stop)
        elif sig == signal.SIGTERM:
            self.should_exit = True
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As of uvicorn."""
        asyncio.get_running_loop().call_later(GRACE, self._stop)
        await super().shutdown(sockets)


def serve(app: Starlette, listening: socket.socket, stop: Callable[[], None]) -> None:
    """Answer until SIGTERM or Ctrl-C; requests that run have `GRACE` seconds to end, then `stop` ends them.

    Raises:
        KeyboardInterrupt: it was Ctrl-C.
    """
    _Server(app, stop).run(sockets=[listening])
