"""`pi-attention train`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from pi_attention.cli.terminal import INTERRUPTED
from pi_attention.training.config import TrainConfig, to_plain


@dataclass
class Train(TrainConfig):
    """Train a π-Transformer on text, and write a run folder."""

    def execute(self, console: Console) -> int:
        """Run the command; the exit code."""
        from pi_attention.training.train import train

        return 0 if train(self, console) else INTERRUPTED


def need_settings_of_run(command: Train, again: Callable[[Train], Train]) -> None:
    """Raise ValueError where the command line names another value than the run that goes on has, if a default's.

    What it names that may be another one, such as the batch size, is noted in `command.named`.

    Args:
        command: as parsed.
        again: the command line over given settings, in place of the defaults.
    """
    from pi_attention.training.resume import SETTINGS, need_same_settings, settings_of

    if not command.run.resume or not (command.run.out / SETTINGS).exists():
        return
    kept = settings_of(command.run.out)
    over_kept = again(Train(kept.data, kept.model, kept.optimizer, kept.run))
    need_same_settings(over_kept, kept, kept)
    found, run, default = to_plain(command), to_plain(kept), to_plain(TrainConfig())
    command.named = frozenset(
        f"{part}.{name}"
        for part, settings in to_plain(over_kept).items()
        for name, value in settings.items()
        if value == found[part][name] and run[part][name] != default[part][name]
    )
