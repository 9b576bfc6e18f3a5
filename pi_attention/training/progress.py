"""What a run reports while it trains: metrics as JSON lines, and a progress bar with loss, tokens/s and time left."""

from __future__ import annotations

import json
import signal
import time
import warnings
from collections import deque
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from pi_attention.files import write_text

METRICS = "metrics.jsonl"
RECENT = 20
"""Steps whose median time is the speed: without the first, which may compile, and as fast as the machine is now."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file; a last one that a crash left incomplete is dropped with a warning.

    Raises:
        ValueError: another line is no JSON object with a step; the message names file and line.
    """
    file = run / METRICS
    if not file.exists():
        return []
    *lines, torn = file.read_bytes().split(b"\n")  # each line ends in one, so what follows the last was cut off
    if torn:
        warnings.warn(f"{file}: the last line is incomplete, as a crash leaves it, and dropped.", stacklevel=2)
    return [_entry(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line]


def _entry(line: bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}): delete the line.") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        raise ValueError(f"{where} is no object with a step: delete the line.")
    return entry


def drop_metrics_after(run: Path, step: int) -> None:
    """Leave out the lines of steps that a resumed run does again."""
    kept = [line for line in read_metrics(run) if line["step"] <= step]
    write_text(run / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def append_metrics(run: Path, step: int, values: dict[str, Any]) -> None:
    """Add a line, in one write."""
    line = json.dumps({"step": step} | values) + "\n"
    with (run / METRICS).open("ab", buffering=0) as lines:
        lines.write(line.encode())


class MetricsFile(TrainerCallback):
    """Append every log entry to metrics.jsonl; after a resume, drop the lines beyond the checkpoint first."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            drop_metrics_after(self.run, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            append_metrics(self.run, state.global_step, logs)


class ProgressBar(TrainerCallback):
    """A rich progress bar; where the output is no terminal, one line for each log entry."""

    def __init__(self, tokens_per_step: int, console: Console) -> None:
        self.tokens_per_step, self.console = tokens_per_step, console
        self.progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  validation {task.fields[validation]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.loss = self.validation = "-"
        self.seconds: deque[float] = deque(maxlen=RECENT)  # of the last steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task(
            "", total=state.max_steps, completed=state.global_step, loss="-", validation="-", speed="-"
        )
        if state.is_world_process_zero:
            self.progress.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begun)
        self._show(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.loss = f"{float(logs['loss']):.3f}"
        if "eval_loss" in logs:
            self.validation = f"{float(logs['eval_loss']):.3f}"
        if state.is_world_process_zero and not self.console.is_terminal and {"loss", "eval_loss"} & set(logs):
            left = (state.max_steps - state.global_step) * (median(self.seconds) if self.seconds else 0.0)
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  loss {self.loss}  validation {self.validation}  "
                f"{self._speed()} tokens/s  {left:.0f} s left"
            )
        self._show(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()

    def _speed(self) -> str:
        return f"{self.tokens_per_step / median(self.seconds):,.0f}" if self.seconds else "-"

    def _show(self, step: int) -> None:
        self.progress.update(self.task, completed=step, loss=self.loss, validation=self.validation, speed=self._speed())


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C (or SIGTERM) ends the current step, saves a checkpoint and stops; a second one stops at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.interrupted = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
