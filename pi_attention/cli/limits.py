"""The range of every number that a command takes, in one table, checked before any work is done."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

MOST = 2**31 - 1
"""Of every whole number without a limit of its own."""
LEAST = {
    "dense_layers": 0,
    "finetune_steps": 0,
    "max_new_tokens": 1,
    "phase": 0,
    "port": 0,
    "seed": 0,
    "sinks": 0,
    "skips": 0,
    "temperature": 0,
    "top_k": 0,
    "waiting": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
}
"""Of a number; 1 of every other whole number."""
MOST_OF = {"seed": 2**32 - 1, "window": 2**62, "period": 2**62, "skips": 2**62, "sinks": 2**62, "memory": 2**20}
MOST_OF |= {"port": 2**16 - 1, "requests": 2**16, "batch_tokens": 2**20}
MOST_OF |= {"heads": 1024, "kv_heads": 1024, "layers": 1024, "dense_layers": 1024}
"""Of some whole numbers; a pattern checks its own."""
POSITIVE = ("learning_rate", "max_grad_norm")
FRACTIONS = ("validation_fraction",)
TEXT = ("train", "eval", "convert")
"""Commands that cut text into blocks, in which a first token predicts a second."""


def check_limits(name: str, settings: object) -> None:
    """Raise ValueError for a number out of range, in the settings of the command `name` or in a part of them."""
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            check_limits(name, value)
        elif isinstance(value, tuple):
            if not value:
                raise ValueError(f"{field.name} is empty: give one value, or one a head or layer.")
            for entry in value:
                _check(name, field.name, entry)
        else:
            _check(name, field.name, value)


def _check(command: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}.")
    if name in FRACTIONS:
        if not 0 < value < 1:
            raise ValueError(f"{name} must be above 0 and below 1, got {value}.")
        return
    if name in POSITIVE:
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}.")
        return
    least = 2 if name == "context" and command in TEXT else LEAST.get(name, 1)
    if command == "convert" and name in ("eval_blocks", "layers"):  # there, 0 measures nothing, or is the first layer
        least = 0
    if value < least:
        why = ": the first token of a block only predicts" if least == 2 else ""
        raise ValueError(f"{name} must be at least {least}, got {value}{why}.")
    if name == "temperature" and 0 < value < 1e-3:
        raise ValueError(f"temperature must be 0, which takes the likeliest token, or at least 0.001, got {value}.")
    if isinstance(value, int) and value > MOST_OF.get(name, MOST):
        raise ValueError(f"{name} must be at most {MOST_OF.get(name, MOST):,}, got {value}.")
