"""Initial values of gate and sink logits, which transformers would draw as those of any layer, or not know."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init

from pi_attention.nn.gate import GateLogits
from pi_attention.nn.layers import SinkLogit


@torch.no_grad()
def initialise(others: Callable[[nn.Module], None], module: nn.Module) -> None:
    """Initialise a module of a model: gate and sink logits as they start, `others` the rest."""
    if isinstance(module, GateLogits):
        init.zeros_(module.weight)
        init.constant_(module.bias, module.initial_bias)
    elif isinstance(module, SinkLogit):
        init.zeros_(module.weight)
    else:
        others(module)
