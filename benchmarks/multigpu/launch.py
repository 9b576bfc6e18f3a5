"""Cases on the GPUs that are free, in order, as long as the time lasts."""

from __future__ import annotations

import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any

from benchmarks.multigpu.rows import Row, Rows
from benchmarks.multigpu.workers import Case, Group, Search


class Launcher:
    """Run searches in order on so many GPUs; rows are written as they come.

    Args:
        rows: where they go, and what is known.
        dry: on gloo and CPUs.
        minutes: after which nothing is started, and what runs is ended.
        start: how processes start, of multiprocessing: "forkserver" imports once.
    """

    def __init__(self, rows: Rows, dry: bool, minutes: float, start: str) -> None:
        self.rows, self.dry = rows, dry
        self.end = time.monotonic() + 60 * minutes
        self.context: Any = get_context(start)
        if start == "forkserver":
            self.context.set_forkserver_preload(["benchmarks.multigpu.workers"])
        self.free = set(range(rows.machine.gpus))
        self.running: list[Group] = []
        self.waiting: deque[tuple[Case, Search]] = deque()

    def run(self, searches: list[Search]) -> None:
        """All of them, as far as the time goes."""
        for search in searches:
            with suppress(StopIteration):
                self.waiting.append((next(search), search))
        while self.waiting or self.running:
            while self.waiting and len(self.free) >= self.waiting[0][0].ranks and time.monotonic() < self.end:
                self._start(*self.waiting.popleft())
            if not self.running:
                break
            wait([pipe for group in self.running for pipe in group.pipes], timeout=0.5)
            for group in list(self.running):
                self._look_after(group)
        if self.waiting:
            print(f"{len(self.waiting)} cases were not begun: the time was up", file=sys.stderr)

    def _start(self, case: Case, search: Search) -> None:
        """Start what of a case has not been measured, or go on with its search."""
        known = [self.rows.of(settings) for settings in case.batch]
        case = replace(case, batch=tuple(s for s, row in zip(case.batch, known, strict=True) if row is None))
        if not case.batch:
            self._go_on(search, known[-1])
            return
        gpus = sorted(self.free)[: case.ranks]
        self.free -= set(gpus)
        for settings in case.batch:
            print(f"on GPUs {gpus}: {case.piece} {settings}", file=sys.stderr, flush=True)
        self.running.append(group := Group(case, search, gpus))
        group.start(self.context, self.dry)

    def _look_after(self, group: Group) -> None:
        """Write its rows; free its GPUs when it is through or has failed."""
        group.deadline = min(group.deadline, self.end)
        rows, failure = group.news()
        case, left = group.case, group.case.batch[group.through :]
        if failure is not None and left:
            rows.append({"piece": case.piece, "ranks": case.ranks, **left[0], "failed": failure})
        for row in rows:
            self.rows.add(row)
            group.last = row
        if failure is None and group.pipes:
            return
        self.running.remove(group)
        group.end()
        self.free |= set(group.gpus)
        if left[1:]:
            self.waiting.appendleft((replace(case, batch=left[1:]), group.search))
        else:
            self._go_on(group.search, group.last)

    def _go_on(self, search: Search, row: Row | None) -> None:
        """The search's next case comes before all others."""
        with suppress(StopIteration):
            self.waiting.appendleft((search.send(row), search))
