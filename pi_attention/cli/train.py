"""`pi-attention train`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from pi_attention.training.config import TrainConfig


@dataclass
class Train(TrainConfig):
    """Train a π-Transformer on text, and write a run folder."""

    def execute(self, console: Console) -> int:
        """Run the command; the exit code."""
        from pi_attention.training.train import train

        return 0 if train(self, console) else 130
