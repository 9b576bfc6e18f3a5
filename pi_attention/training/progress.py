"""What a run reports while it trains: a progress bar with loss, tokens/s and time left, metrics, trackers."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from statistics import median
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pi_attention.training.metrics import append_metrics
from pi_attention.training.trackers import Trackers

RECENT = 20
"""Steps whose median time is the speed: without the first, which may compile, and as fast as the machine is now."""


class ProgressBar:
    """A rich progress bar; where the output is no terminal, one line for each report.

    Args:
        steps: of the whole run.
        done: steps that are behind it.
        tokens_per_step: of all ranks.
        console: quiet on all ranks but one.
    """

    def __init__(self, steps: int, done: int, tokens_per_step: int, console: Console) -> None:
        self.steps, self.done, self.tokens_per_step, self.console = steps, done, tokens_per_step, console
        self.bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  validation {task.fields[validation]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=steps, completed=done, loss="-", validation="-", speed="-")
        self.loss = self.validation = "-"
        self.seconds: deque[float] = deque(maxlen=RECENT)  # of the last steps
        self.begun = time.perf_counter()

    def step_begins(self) -> None:
        """What went before, such as a validation, is no part of the step."""
        self.begun = time.perf_counter()

    def step_ends(self) -> None:
        """A step is done."""
        self.seconds.append(time.perf_counter() - self.begun)
        self.done += 1
        self._show()

    def show(self, values: dict[str, float]) -> None:
        """Show the loss and eval_loss among the values: the bar shows the last of each, a line those of its step."""
        loss, validation = (f"{values[name]:.3f}" if name in values else "-" for name in ("loss", "eval_loss"))
        self.loss = loss if "loss" in values else self.loss
        self.validation = validation if "eval_loss" in values else self.validation
        if not self.console.is_terminal:
            left = (self.steps - self.done) * (median(self.seconds) if self.seconds else 0.0)
            self.console.print(
                f"step {self.done}/{self.steps}  loss {loss}  validation {validation}  "
                f"{self._speed()} tokens/s  {left:.0f} s left",
                soft_wrap=True,
            )
        self._show()

    def _speed(self) -> str:
        return f"{self.tokens_per_step / median(self.seconds):,.0f}" if self.seconds else "-"

    def _show(self) -> None:
        self.bar.update(self.task, completed=self.done, loss=self.loss, validation=self.validation, speed=self._speed())


class Reports:
    """Where a run's figures go: the bar, metrics.jsonl, and trackers; of one rank, the others keep silent.

    Args:
        run: the run's folder; None writes nothing.
        bar: of the run.
        trackers: of the run; None with no folder.
    """

    def __init__(self, run: Path | None, bar: ProgressBar, trackers: Trackers | None) -> None:
        self.run, self.bar, self.trackers = run, bar, trackers

    def __enter__(self) -> Reports:
        self.bar.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.bar.stop()
        if self.trackers is not None:
            self.trackers.__exit__(kind, error, at)

    def add(self, step: int, **values: float) -> None:
        """Report figures of a step; names that begin with eval_ are of the validation."""
        if self.run is None or self.trackers is None:
            return
        append_metrics(self.run, step, values)
        self.trackers.log(step, values)
        self.bar.show(values)
