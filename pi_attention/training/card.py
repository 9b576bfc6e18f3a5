"""The card of a run's model, from what the run's folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pi_attention import plots
from pi_attention.describe import is_dense
from pi_attention.models.card import write_card
from pi_attention.pattern import PiPattern
from pi_attention.training.config import TrainConfig

PICTURE = "pattern.png"


def write_run_card(folder: Path, config: Any, settings: TrainConfig, summary: dict[str, Any]) -> None:
    """Write card and picture of a run's model.

    Args:
        folder: of the model.
        config: of the model.
        settings: of the run.
        summary: its last step, loss and eval_loss.
    """
    data, optimizer = settings.data, settings.optimizer
    facts = {
        "data": f"{data.data}, {data.validation_fraction:.0%} held out",
        "tokenizer": data.tokenizer,
        "context": f"{data.context:,} tokens",
        "steps": f"{summary.get('step', optimizer.steps):,}",
        "peak learning rate": f"{optimizer.learning_rate:g}",
        "seed": str(settings.run.seed),
    }
    for name, words in (("loss", "training loss"), ("eval_loss", "validation loss")):
        if name in summary:
            facts[words] = f"{float(summary[name]):.3f} nats a token"
    picture = save_picture(folder, config.patterns(), data.context)
    write_card(folder, config, facts, picture=picture)


def save_picture(folder: Path, patterns: list[PiPattern], context: int) -> str:
    """The picture of the first pattern that is not dense, in the folder; its name, or nothing where all are dense."""
    if all(is_dense(pattern, context) for pattern in patterns):
        return ""
    plots.save(plots.stack_picture(patterns, context), folder / PICTURE)
    return PICTURE
