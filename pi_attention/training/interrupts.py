"""Ctrl-C, noted until a step has ended."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """Notes Ctrl-C (SIGINT) or SIGTERM, so that the run ends after the current step and saves it.

    Args:
        second_stops: whether a second one stops at once; of many ranks none may leave alone, and torchrun ends all
            of them when they take too long.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, *, second_stops: bool = True) -> None:
        self.noted, self.second_stops = False, second_stops
        self.previous: dict[signal.Signals, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted and self.second_stops:
            raise KeyboardInterrupt
        self.noted = True

    def __enter__(self) -> Interrupts:
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
