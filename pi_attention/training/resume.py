"""The settings with which a run goes on, and what a folder must hold or not hold for a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pi_attention.distributed.layout import Layout
from pi_attention.models import PiConfig
from pi_attention.training.checkpoints import CONFIG
from pi_attention.training.config import ModelSettings, TrainConfig, load_yaml, to_plain
from pi_attention.units import counted

SETTINGS = "train.yaml"
LAST_SETTING = "zero"
"""Of the file of settings: where it is missing, the file was cut off."""
BATCH = ("optimizer.batch_size", "optimizer.gradient_accumulation")
"""How the blocks of a step are divided, which the layout changes."""
OF_THE_MOMENT: tuple[str, ...] = ("run.out", "run.resume", "run.parallel", "run.zero", "run.patience", "run.checkpoint")
OF_THE_MOMENT += ("run.report_to", "run.push_to_hub")
"""Settings that are not of the run, but of the machine and the moment."""
OF_MODEL = {
    "vocab_size": "the vocabulary of tokenizer",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "max_position_embeddings": "context",
}
"""Fields of the model's configuration that a run's settings call otherwise."""


def refuse_to_overwrite(config: TrainConfig) -> None:
    """Raise FileExistsError for a folder that holds a run, ValueError for a checkpoint to go on from without resume."""
    out = config.run.out
    if config.run.checkpoint is not None:
        raise ValueError(f"checkpoint={config.run.checkpoint} is for a run that goes on: add --resume.")
    if (out / SETTINGS).exists():
        raise FileExistsError(
            f"out={str(out)!r} holds a run already: choose another folder, delete it, or use --resume."
        )


def settings_to_resume(given: TrainConfig) -> TrainConfig:
    """The settings of the run in a folder, with the given layout; a step keeps its number of blocks.

    Args:
        given: its run.out names the folder; every other setting must be the run's, or a default, or of the moment.
            Where batch_size and gradient_accumulation are the defaults, they are chosen for the layout.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: a setting differs from the run's, or the file of its settings is not whole.
    """
    out = given.run.out
    if not (out / SETTINGS).exists():
        raise FileNotFoundError(f"out={str(out)!r} holds no run to resume: leave out --resume, or give its folder.")
    config = settings_of(out)
    need_same_settings(given, config, TrainConfig())
    blocks = blocks_a_step(config)
    config.run.out, config.run.resume, config.run.checkpoint = out, False, None
    config.run.parallel, config.run.zero, config.run.patience = given.run.parallel, given.run.zero, given.run.patience
    for name in ("report_to", "push_to_hub"):
        if given.gives("run", name):
            setattr(config.run, name, getattr(given.run, name))
    divide_blocks(config, blocks, given)
    return config


def settings_of(out: Path) -> TrainConfig:
    """The settings of the run in a folder.

    Raises:
        ValueError: the file of its settings is not whole.
    """
    need_whole_settings(out / SETTINGS)
    return load_yaml(TrainConfig, out / SETTINGS)


def differing(asked: dict[str, Any], kept: dict[str, Any], left_out: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Settings that somebody gave, and not as they were kept: name, value given, value kept.

    Args:
        asked: values asked for, by name.
        kept: those that were kept.
        left_out: what a value is that nobody gave.
    """
    for name, value in kept.items():
        if asked[name] not in (value, left_out[name]):
            yield name, asked[name], value


def need_same_settings(given: TrainConfig, config: TrainConfig, left_out: TrainConfig) -> None:
    """Raise ValueError for a setting that is to differ from the run's.

    Args:
        given: the settings asked for.
        config: those of the run.
        left_out: what a setting is that nobody gave.
    """
    asked, none, kept = (to_plain(settings) for settings in (given, left_out, config))
    period, phase = given.model.period, given.model.phase
    if (period, phase) != (left_out.model.period, left_out.model.phase):
        period = config.model.period if period == left_out.model.period else period
        if replace(config.model, period=period, phase=phase).pattern() == config.model.pattern():
            asked["model"] |= {name: kept["model"][name] for name in ("period", "phase")}
    for part, settings in kept.items():
        for name, other, value in differing(asked[part], settings, none[part]):
            if f"{part}.{name}" not in OF_THE_MOMENT + BATCH:
                raise ValueError(
                    f"{name}={other!r} differs from {value!r} of the run in out={str(given.run.out)!r}, and a resumed "
                    "run keeps its settings: leave it out, or train anew in another folder."
                )


def blocks_a_step(config: TrainConfig) -> int:
    """Blocks of an optimizer step, over all ranks and accumulations."""
    o = config.optimizer
    return o.batch_size * o.gradient_accumulation * Layout.parse(config.run.parallel).dp


def divide_blocks(config: TrainConfig, blocks: int, given: TrainConfig) -> None:
    """Set batch_size and gradient_accumulation of a run so that a step has so many blocks at its layout.

    Args:
        config: of the run; changed in place.
        blocks: of a step.
        given: its batch_size and gradient_accumulation are those asked for, or defaults that nobody named.

    Raises:
        ValueError: there is no such division.
    """
    each, asked = blocks // Layout.parse(config.run.parallel).dp, given.optimizer
    batch = asked.batch_size if given.gives("optimizer", "batch_size") else None
    accumulation = asked.gradient_accumulation if given.gives("optimizer", "gradient_accumulation") else None
    if batch is None:
        batch = math.gcd(config.optimizer.batch_size, each) if accumulation is None else each // accumulation
    if accumulation is None:
        accumulation = each // batch
    config.optimizer.batch_size, config.optimizer.gradient_accumulation = batch, accumulation
    if blocks_a_step(config) != blocks:
        parts = {"batch_size": batch, "gradient_accumulation": accumulation, "parallel": config.run.parallel}
        named = ", ".join(f"{name}={value!r}" for name, value in parts.items() if value)
        raise ValueError(
            f"a step of the run has {counted(blocks, 'block')}, but {named} cannot share them evenly: "
            "give divisors, or leave them out."
        )


def need_whole_settings(file: Path) -> None:
    """Raise ValueError where a part of a run's settings is gone: a default in its place would be another run."""
    text = file.read_text(encoding="utf-8", errors="replace")
    begun = set(re.findall(r"^(?:  )?(\w+):", text, re.MULTILINE))
    if not begun >= {*to_plain(TrainConfig()), LAST_SETTING} or not text.endswith("\n"):
        raise ValueError(
            f"{file} is incomplete, it was cut off or is empty: write the run's settings into it again, or train anew "
            "in another folder. Nothing was changed."
        )


def need_same_model(wanted: PiConfig, checkpoint: Path, settings: Path) -> None:
    """Raise ValueError where the settings of a run, in a file, spell another model than its checkpoint holds.

    A checkpoint of an earlier version may not say what model it is of.
    """
    if not (checkpoint / CONFIG).exists():
        return
    kept = PiConfig.from_pretrained(checkpoint)
    names = {name: OF_MODEL.get(name, name) for name in (*OF_MODEL, *(field.name for field in fields(ModelSettings)))}
    differ = [
        f"{setting}={getattr(wanted, name)!r} ({getattr(kept, name)!r} in {checkpoint.name})"
        for name, setting in names.items()
        if hasattr(kept, name) and getattr(wanted, name) != getattr(kept, name)
    ]
    if differ:
        raise ValueError(
            f"{settings} has other settings than the run's checkpoint: {', '.join(differ)}. Write those of the "
            "checkpoint back into the file, or train anew in another folder."
        )
