"""Checkpoints that transformers.Trainer wrote for earlier versions, where a run had one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer

OPTIMIZER = "optimizer.pt"


def is_of_trainer(checkpoint: Path) -> bool:
    """Whether a checkpoint's folder is one of transformers.Trainer."""
    return (checkpoint / OPTIMIZER).exists()


def tensors_of_trainer(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Its tensors by the names of a checkpoint of ours; the states of random generators, which no step asks, are left.

    Args:
        checkpoint: the folder.
        model: of the names, in their order.
        optimizer: of the model, with the same groups as the Trainer's, which numbers parameters by their place there.

    Raises:
        pickle.UnpicklingError: the optimizer's file holds other things than tensors and numbers.
    """
    weights = {name: x for file in checkpoint.glob("model*.safetensors") for name, x in load_file(file).items()}
    moments = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in moments["param_groups"] for number in group["params"]]
    state = {name: moments["state"][number] for name, number in zip(names, numbers, strict=True)}
    return {"model": weights, "optimizer": {"state": state}}
