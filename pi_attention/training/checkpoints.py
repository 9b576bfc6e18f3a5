"""Checkpoints that are whole or absent, and a Trainer that writes them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

PARTIAL = ".partial"


def last_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run's folder."""
    found = get_last_checkpoint(str(run)) if run.is_dir() else None
    return None if found is None else Path(found)


def sync(folder: Path) -> None:
    """Have the files on the disk before their folder gets its name."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
        sync(written)
        final = run / written.name
        if final.exists():  # the same step again, after a resume
            shutil.rmtree(final)
        written.replace(final)
        staging.rmdir()
        checkpoints = sorted(run.glob("checkpoint-*"), key=step_of)
        for old in checkpoints[: -(self.args.save_total_limit or len(checkpoints))]:
            shutil.rmtree(old)
