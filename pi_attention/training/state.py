"""Weights and optimizer state as a checkpoint, the same from every layout of ranks and for every one.

The format is torch.distributed.checkpoint's, of tensors alone. Its list of tensors is a pickle, and it would unpickle
what is no tensor; here the list is made of its own kinds or refused, and nothing else is unpickled.
"""

from __future__ import annotations

import io
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from pi_attention.files import write_text
from pi_attention.training.checkpoints import CONFIG, PARTIAL, Contents, contents, publish_checkpoint, seal, step_of
from pi_attention.training.earlier import is_of_trainer, tensors_of_trainer

ALONE = "torch.distributed is disabled"
"""How a warning of DCP begins which is none: a run of one process needs no process group."""
_OF_METADATA = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
KNOWN = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _OF_METADATA),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
"""All that a list of tensors is made of, beside dtypes."""


class _ListOfTensors(pickle.Unpickler):
    """An unpickler of `Metadata`, which refuses every other name before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"its list of tensors holds {module}.{name}, which is none of its kinds")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            metadata = _ListOfTensors(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TensorsAlone(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is no tensor")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def tied_weights(model: nn.Module) -> set[str]:
    """Further names of parameters that have one already."""
    once = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - once


def _tensors(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """State dicts of model and optimizer, and the tensors of both that a checkpoint holds, tied ones once."""
    weights, moments = get_state_dict(model, optimizer)
    tied = tied_weights(model)
    held = {name: x for name, x in weights.items() if name not in tied}
    return weights, moments, {"model": held, "optimizer": {"state": moments["state"]}}


def save(run: Path, step: int, model: nn.Module, optimizer: Optimizer, keep: int) -> None:
    """Write a checkpoint, by all ranks where there are many; it has its name only when it is complete.

    Raises:
        OSError: its tensors cannot be written, as on a full disk. Earlier checkpoints stay.
    """
    staging = run / PARTIAL
    if _rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
    _barrier()
    try:
        _write(_tensors(model, optimizer)[2], staging, no_dist=not dist.is_initialized())
    except CheckpointException as error:  # of a rank, told to all
        raise _unwritten(run, step, error) from error
    noted = contents(staging, f"__{_rank()}_*")  # the files of this rank
    if dist.is_initialized():
        parts: list[Contents] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, noted)
        noted = {name: note for part in parts for name, note in part.items()}
    if _rank() == 0:
        config: Any = getattr(model, "config", None)
        if config is not None:
            write_text(staging / CONFIG, config.to_json_string(use_diff=False))
        seal(staging, noted | contents(staging, ".metadata") | contents(staging, CONFIG))
        publish_checkpoint(staging, run, step, keep)
    _barrier()


def _reason(error: CheckpointException) -> str:
    """What the first rank that failed says, in one line."""
    cause = next(cause for cause, _ in error.failures.values())
    return " ".join(str(cause).split())


def _unwritten(run: Path, step: int, error: CheckpointException) -> OSError:
    """In words, once what was written of the checkpoint is gone, which takes the room of the next."""
    free = shutil.disk_usage(run).free
    if _rank() == 0:
        shutil.rmtree(run / PARTIAL, ignore_errors=True)
    return OSError(
        f"out={str(run)!r}: the checkpoint of step {step} cannot be written, with {free:,} bytes free on its disk "
        f"({_reason(error)}): free room, then go on with --resume."
    )


def load(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Load a checkpoint of any layout, or of an earlier version, into this model; the step that it was made after.

    Raises:
        ValueError: it is of another model, or holds what is no tensor.
    """
    weights, moments, state = _tensors(model, optimizer)
    folder = checkpoint
    try:
        if is_of_trainer(checkpoint):
            folder = checkpoint.parent / PARTIAL
            if _rank() == 0:
                _write(tensors_of_trainer(checkpoint, model, optimizer), folder, no_dist=True)
            _barrier()
        _read(state, folder)
    except (CheckpointException, pickle.UnpicklingError) as error:
        reason = _reason(error) if isinstance(error, CheckpointException) else " ".join(str(error).split())
        raise ValueError(f"{checkpoint.name} of out={str(checkpoint.parent)!r} cannot be loaded: {reason}") from error
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    if folder != checkpoint:
        _barrier()
        if _rank() == 0:
            shutil.rmtree(folder)
    return step_of(checkpoint)


def _write(state: dict[str, Any], folder: Path, *, no_dist: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ALONE)
        state_dict_saver.save(state, checkpoint_id=str(folder), no_dist=no_dist)


def _read(state: dict[str, Any], folder: Path) -> None:
    no_dist = not dist.is_initialized()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ALONE)
        state_dict_loader.load(state, storage_reader=_Reader(folder), planner=_TensorsAlone(), no_dist=no_dist)
