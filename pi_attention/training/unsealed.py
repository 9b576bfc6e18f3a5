"""What can be verified of a checkpoint of an earlier version, which noted neither sizes nor checksums."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pi_attention.training.earlier import is_of_trainer


def damage_unsealed(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint without a manifest, in words; None when each can be read.

    JSON is parsed, the sizes in the header of .safetensors are compared with the file, and the checksums inside of
    PyTorch's archives with their contents.
    """
    members = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    if not members:
        return "it is empty"
    needed = "model*.safetensors" if is_of_trainer(checkpoint) else ".metadata"
    if not list(checkpoint.glob(needed)):
        return f"{needed} is missing"
    broken = [path.name for path in members if not _readable(path)]
    return f"{broken[0]} cannot be read" if broken else None


def _readable(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
    except (ValueError, OSError, SafetensorError, zipfile.BadZipFile):
        return False
    return path.stat().st_size > 0
