"""A fine-tune that was interrupted: what its folder keeps until it has ended."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pi_attention.data.packing import PackedBlocks
from pi_attention.files import write_text
from pi_attention.training.checkpoints import CONFIG, MANIFEST, checkpoints_of, damage
from pi_attention.training.config import load_yaml, save_yaml, to_plain
from pi_attention.training.resume import differing
from pi_attention.training.text import TEXT, seal_of

SETTINGS = "settings.yaml"
"""Of the folder: all settings, written at the end."""
FOUND = "found.json"
"""Of the folder: what was found before the fine-tune began."""

Settings = TypeVar("Settings")


def keep(folder: Path, settings: object, found: Mapping[str, Any], **parts: PackedBlocks) -> None:
    """Write down a fine-tune that begins.

    Args:
        folder: of its checkpoints; one that is there is emptied.
        settings: of the command, a dataclass.
        found: what was found before, in values of JSON.
        parts: of the text.
    """
    shutil.rmtree(folder, ignore_errors=True)
    write_text(folder / TEXT, json.dumps(seal_of(**parts), indent=1))
    write_text(folder / FOUND, json.dumps(found, indent=1))
    save_yaml(settings, folder / SETTINGS)


def kept(folder: Path, asked: Settings, of_the_moment: tuple[str, ...]) -> tuple[Settings, dict[str, Any]]:
    """Settings of a fine-tune that was interrupted, and what was found before it began.

    Args:
        folder: of its checkpoints.
        asked: settings of the command, each a default or as they were.
        of_the_moment: names of settings that may differ.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a setting differs, or a file is damaged.
    """
    if not (folder / SETTINGS).exists() and (folder.parent / CONFIG).exists():
        raise FileNotFoundError(f"out={str(folder.parent)!r} holds a model that is finished: nothing is left to do.")
    if not (folder / SETTINGS).exists():
        raise FileNotFoundError(
            f"out={str(folder.parent)!r} holds no fine-tune that was interrupted: leave out --resume, or name the "
            "folder of one."
        )
    settings = load_yaml(type(asked), folder / SETTINGS)
    for name, given, value in differing(*map(to_plain, (asked, settings, type(asked)()))):
        if name not in of_the_moment:
            raise ValueError(
                f"{name}={given!r} differs from {value!r} of the fine-tune in out={str(folder.parent)!r}, which "
                "keeps its settings: leave it out, or convert anew in another folder."
            )
    try:
        found: dict[str, Any] = json.loads((folder / FOUND).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / FOUND} is damaged: convert anew in another folder.") from error
    return settings, found


def whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that is as it was written, if there is one; those after it are removed.

    Whichever it is, training from there on gives the same result.
    """
    for checkpoint in reversed(checkpoints_of(folder)):
        wrong = damage(checkpoint) if (checkpoint / MANIFEST).exists() else "it was not written to its end"
        if wrong is None:
            return checkpoint
        warnings.warn(f"{checkpoint} is damaged, {wrong}: what came before it is used.", stacklevel=2)
        shutil.rmtree(checkpoint)
    return None
