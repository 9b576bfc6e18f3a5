"""Checkpoints as folders: found, whole or absent, checked, chosen. What is in them is the business of `state`."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

from pi_attention import files
from pi_attention.training.unsealed import damage_unsealed

PARTIAL = ".partial"
MANIFEST = "files.json"
"""Of a checkpoint: the size and the CRC-32 of each of its files."""
CONFIG = "config.json"
"""Of a checkpoint: the configuration of its model."""
ASIDE = "aside-"
NAME = re.compile(r"(checkpoint|sharded)-\d+")
"""Earlier versions called checkpoints of many ranks "sharded"."""

Contents = dict[str, tuple[int, int]]


def checkpoints_of(run: Path) -> list[Path]:
    """The complete checkpoints of a run's folder, oldest first."""
    found = [path for path in run.glob("*-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def last_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run's folder."""
    known = checkpoints_of(run)
    return known[-1] if known else None


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint's name ends in."""
    return int(checkpoint.name.rpartition("-")[2])


def contents(folder: Path, pattern: str = "*") -> Contents:
    """Size and CRC-32 of each file of a folder whose name matches a pattern."""
    members = [path for path in sorted(folder.rglob(pattern)) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, files.checksum(path)) for path in members}


def seal(folder: Path, noted: Contents) -> None:
    """Write the list of a checkpoint's files, have all of them on the disk, before their folder gets its name."""
    files.write_text(folder / MANIFEST, json.dumps(noted, indent=1))
    files.sync_folder(folder)


def publish(partial: Path, final: Path) -> None:
    """Give a folder its name, in place of an earlier one, once all of it is on the disk."""
    files.sync_folder(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)


def publish_checkpoint(partial: Path, run: Path, step: int, keep: int) -> None:
    """Give a sealed checkpoint its name, in place of one of the same step, and remove all but the newest `keep`."""
    for path in checkpoints_of(run):
        if step_of(path) == step:  # after a resume
            shutil.rmtree(path)
    partial.replace(run / f"checkpoint-{step}")
    for old in checkpoints_of(run)[:-keep]:
        shutil.rmtree(old)


def damage(checkpoint: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, in words; None when they are as they were written.

    Args:
        checkpoint: its folder.
        rank, ranks: the bytes of every file are read by one of so many ranks; all look at its size.
    """
    file = checkpoint / MANIFEST
    if not file.exists():
        return damage_unsealed(checkpoint)
    try:
        noted = json.loads(file.read_bytes())
        if not noted:
            return f"{MANIFEST} names no file"
        for number, (name, (size, checksum)) in enumerate(noted.items()):
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            mine = number % ranks == rank and checksum is not None  # earlier versions left it out with many ranks
            if mine and files.checksum(path) != checksum:
                return f"the bytes of {name} have changed"
    except (ValueError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def checkpoint_to_resume(run: Path, step: int | None, rank: int = 0, ranks: int = 1) -> Path | None:
    """The checkpoint that a run goes on from: the last one, or that of `step`; None when there is none yet.

    Args:
        run: the run's folder.
        step: of the checkpoint that the user chose.
        rank, ranks: see `damage`.

    Raises:
        ValueError: it is damaged; the message names the one before it, which is used only when asked for by its step.
            Or there is none of that step.
    """
    known = checkpoints_of(run)
    chosen = [path for path in known if step is None or step_of(path) == step][-1:]
    if not chosen and step is not None:
        raise ValueError(
            f"checkpoint={step}, but out={str(run)!r} holds checkpoints of the steps {[step_of(p) for p in known]}: "
            "choose one of them, or leave it out."
        )
    wrong = damage(chosen[0], rank, ranks) if chosen else None
    if wrong is None:
        if chosen and rank == 0 and not (chosen[0] / MANIFEST).exists():
            warnings.warn(
                f"{chosen[0].name} of out={str(run)!r} has no {MANIFEST}, as an earlier version wrote it: its files "
                "can be read, but whether they are those that were written is not known.",
                stacklevel=2,
            )
        return chosen[0] if chosen else None
    whole = [path for path in known if step_of(path) < step_of(chosen[0]) and damage(path) is None]
    remedy = "There is no whole one before it: train anew in another folder."
    if whole:
        remedy = f"The one before it is {whole[-1].name}: go on from there by --checkpoint {step_of(whole[-1])}."
    raise ValueError(f"{chosen[0].name} of out={str(run)!r} is damaged, {wrong}. {remedy}")


def put_aside_after(run: Path, chosen: Path) -> None:
    """Rename the checkpoints of later steps than the one that the user chose, so that none is taken for the last."""
    for path in checkpoints_of(run):
        if step_of(path) > step_of(chosen):
            aside = path.with_name(ASIDE + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
