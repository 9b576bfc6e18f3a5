"""What a run reports while it trains: a progress bar with loss, tokens/s and time left, metrics, TensorBoard events."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from statistics import median
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from pi_attention.training.metrics import append_metrics

RECENT = 20
"""Steps whose median time is the speed: without the first, which may compile, and as fast as the machine is now."""
EVENTS = "runs"
"""Folder of a run for TensorBoard."""


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
        """Show the loss and eval_loss among the values."""
        self.loss = f"{values['loss']:.3f}" if "loss" in values else self.loss
        self.validation = f"{values['eval_loss']:.3f}" if "eval_loss" in values else self.validation
        if not self.console.is_terminal:
            left = (self.steps - self.done) * (median(self.seconds) if self.seconds else 0.0)
            self.console.print(
                f"step {self.done}/{self.steps}  loss {self.loss}  validation {self.validation}  "
                f"{self._speed()} tokens/s  {left:.0f} s left"
            )
        self._show()

    def _speed(self) -> str:
        return f"{self.tokens_per_step / median(self.seconds):,.0f}" if self.seconds else "-"

    def _show(self) -> None:
        self.bar.update(self.task, completed=self.done, loss=self.loss, validation=self.validation, speed=self._speed())


class Reports:
    """Where a run's figures go: the bar, metrics.jsonl, and event files; of one rank, the others keep silent.

    Args:
        run: the run's folder; None writes nothing.
        bar: of the run.
    """

    def __init__(self, run: Path | None, bar: ProgressBar) -> None:
        self.run, self.bar = run, bar
        self.events = None if run is None else SummaryWriter(str(run / EVENTS))

    def __enter__(self) -> Reports:
        self.bar.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.bar.stop()
        if self.events is not None:
            self.events.close()

    def add(self, step: int, **values: float) -> None:
        """Report figures of a step; names that begin with eval_ are of the validation."""
        if self.run is None or self.events is None:
            return
        append_metrics(self.run, step, values)
        for name, value in values.items():
            tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
            self.events.add_scalar(tag, value, step)
        self.bar.show(values)
