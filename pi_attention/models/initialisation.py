"""Initial values of the fusion gate's logits, which transformers would draw as those of any linear layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init

from pi_attention.nn.gate import GateLogits


@torch.no_grad()
def initialise(others: Callable[[nn.Module], None], module: nn.Module) -> None:
    """Initialise a module of a model: the gate's logits as they start, `others` the rest."""
    if isinstance(module, GateLogits):
        init.zeros_(module.weight)
        init.constant_(module.bias, module.initial_bias)
    else:
        others(module)
