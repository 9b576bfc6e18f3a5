"""Fusion gates in the attention layers of a decoder of transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pi_attention.models.initialisation import initialise
from pi_attention.nn.gate import FusionGate
from pi_attention.ops.checks import DTYPES
from pi_attention.pattern import PiPattern

GATE = "pi_gate"
"""Name of the gate in an attention module, and of its logits among the arguments of the attention function."""


def add_gates(model: PreTrainedModel, patterns: list[PiPattern]) -> None:
    """A gate in each layer with skips; a hook hands its logits to the attention function.

    Raises:
        NotImplementedError: a layer has no attention that a gate can be added to.
    """
    config, found = model.config, set()
    for module in model.modules():
        layer: Any = getattr(module, "layer_idx", None)
        if takes_gate(module) and patterns[layer].skips != 0:
            found.add(layer)
            gate = FusionGate(config.hidden_size, config.num_attention_heads)
            projection: Any = module.q_proj
            module.add_module(GATE, gate.to(*_place(model, projection)))
            module.register_forward_pre_hook(_pass_gate, with_kwargs=True)
    missed = [layer for layer, pattern in enumerate(patterns) if pattern.skips != 0 and layer not in found]
    if missed:
        raise NotImplementedError(f"no attention module with q_proj in layer {missed[0]}: convert with gate=False.")


def takes_gate(module: nn.Module) -> bool:
    """Whether it is the attention of a layer, of the make that a gate can be added to."""
    return getattr(module, "layer_idx", None) is not None and hasattr(module, "q_proj")


def initialise_gates_of(model: PreTrainedModel) -> None:
    """The gates lie in models that initialise what a checkpoint lacks by rules of their own: teach them the gates'."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part._init_weights = partial(initialise, part._init_weights)


def _place(model: PreTrainedModel, projection: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a layer computes, and in which dtype: as its weights, unless they are quantised, packed or wrapped."""
    embeddings: Any = model.get_input_embeddings()
    weights = [x for x in (*projection.parameters(), *projection.buffers()) if x.dim() > 1] + [embeddings.weight]
    dtypes = (*(x.dtype for x in weights), model.config.dtype)
    return weights[0].device, next((dtype for dtype in dtypes if dtype in DTYPES), torch.float32)


def _pass_gate(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden_states = args[0] if args else kwargs["hidden_states"]
    gate: Any = getattr(module, GATE)
    return args, kwargs | {GATE: gate(hidden_states)}
