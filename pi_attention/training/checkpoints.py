"""Checkpoints that are whole or absent, and a Trainer that writes them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer

from pi_attention import files

PARTIAL = ".partial"
MANIFEST = "files.json"
"""Of a checkpoint: the size of each of its files, and its CRC-32 where one process wrote them all."""
ASIDE = "aside-"


def checkpoints_of(run: Path, kind: str = "checkpoint") -> list[Path]:
    """The complete checkpoints of a run's folder, oldest first; kind "sharded" are those of many ranks."""
    found = [path for path in run.glob(f"{kind}-*") if path.is_dir() and re.fullmatch(rf"{kind}-\d+", path.name)]
    return sorted(found, key=step_of)


def last_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run's folder."""
    known = checkpoints_of(run)
    return known[-1] if known else None


def seal(folder: Path, *, checksums: bool) -> None:
    """Note the size of each file, have all of them on the disk, before their folder gets its name."""
    members = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    noted = {
        str(path.relative_to(folder)): [path.stat().st_size, files.checksum(path) if checksums else None]
        for path in members
    }
    files.write_text(folder / MANIFEST, json.dumps(noted, indent=1))
    sync(folder)


def sync(folder: Path) -> None:
    """Have all files and folders of a folder on the disk."""
    for path in [*folder.rglob("*"), folder]:
        files.sync(path)


def publish(partial: Path, final: Path) -> None:
    """Give a folder its name, in place of an earlier one, once all of it is on the disk."""
    sync(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None when they are as they were written."""
    file = checkpoint / MANIFEST
    if not file.exists():
        return None if any(checkpoint.iterdir()) else "it is empty"  # of an earlier version
    try:
        noted = json.loads(file.read_bytes())
        if not noted:
            return f"{MANIFEST} names no file"
        for name, (size, checksum) in noted.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if checksum is not None and files.checksum(path) != checksum:
                return f"the bytes of {name} have changed"
    except (ValueError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def checkpoint_to_resume(run: Path, step: int | None, kind: str = "checkpoint") -> Path | None:
    """The checkpoint that a run goes on from: the last one, or that of `step`; None when there is none yet.

    Raises:
        ValueError: it is damaged; the message names the one before it, which is used only when asked for by its step.
            Or there is none of that step.
    """
    known = checkpoints_of(run, kind)
    chosen = [path for path in known if step is None or step_of(path) == step][-1:]
    if not chosen and step is not None:
        raise ValueError(
            f"checkpoint={step}, but out={str(run)!r} holds checkpoints of the steps {[step_of(p) for p in known]}: "
            "choose one of them, or leave it out."
        )
    wrong = damage(chosen[0]) if chosen else None
    if wrong is None:
        return chosen[0] if chosen else None
    whole = [path for path in known if step_of(path) < step_of(chosen[0]) and damage(path) is None]
    remedy = "There is no whole one before it: train anew in another folder."
    if whole:
        remedy = f"The one before it is {whole[-1].name}: go on from there by --checkpoint {step_of(whole[-1])}."
    raise ValueError(f"{chosen[0].name} of out={str(run)!r} is damaged, {wrong}. {remedy}")


def put_aside_after(run: Path, chosen: Path, kind: str = "checkpoint") -> None:
    """Rename the checkpoints of later steps than the one that the user chose, so that none is taken for the last."""
    for path in checkpoints_of(run, kind):
        if step_of(path) > step_of(chosen):
            aside = path.with_name(ASIDE + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint's name ends in."""
    return int(checkpoint.name.rpartition("-")[2])


class AtomicTrainer(Trainer):
    """transformers.Trainer whose checkpoints appear under their name only when complete.

    A checkpoint is written into a hidden folder, synced, then renamed; so a process killed at any moment leaves the
    earlier checkpoints and perhaps a hidden folder, which the next save clears away.
    """

    _staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        staging = run / PARTIAL
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._publish(staging, run)
        self.accelerator.wait_for_everyone()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As the Trainer's, but for weights that the model ties to others: a checkpoint holds them once."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result)

    def _publish(self, staging: Path, run: Path) -> None:
        (written,) = staging.glob("checkpoint-*")
        seal(written, checksums=True)
        final = run / written.name
        if final.exists():  # the same step again, after a resume
            shutil.rmtree(final)
        written.replace(final)
        staging.rmdir()
        checkpoints = checkpoints_of(run)
        for old in checkpoints[: -(self.args.save_total_limit or len(checkpoints))]:
            shutil.rmtree(old)
