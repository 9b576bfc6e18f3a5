"""Layers that see beyond the context of the pretraining: their rotary embedding turns slower, that of the others not.

By the "NTK-aware" rule the base is multiplied by rᵈ⁄⁽ᵈ⁻²⁾, with r the new context over the pretrained one and d the
features that turn. So the slowest feature turns as far in the new context as it did in the old one, and the fastest as
before (YaRN, arXiv 2309.00071, section 3.1). Windows keep the lags that they know, and need no change.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pi_attention.convert.rotary import rotary_modules
from pi_attention.pattern import PiPattern, need_int

ANGLES = "position_embeddings"
"""Argument of an attention of transformers: cos and sin of the rotary embedding."""
UNTURNED = ("cohere2", "exaone4")
"""Models whose layers of full attention have no rotary embedding."""
CALL = "pi_call"
"""Argument in which a converted model tells its layers about the call."""


def check_extension(extend_to: Any, config: PretrainedConfig, patterns: list[PiPattern]) -> None:
    """Refuse a context that no layer could be extended to.

    Raises:
        TypeError, ValueError: it is no whole number, not beyond the pretrained context, or no layer sees beyond that.
        NotImplementedError: the model has no context, or its rotary embedding is not the plain one.
    """
    if extend_to is None:
        return
    need_int("extend_to", extend_to, 1, "it is the context that the model is to see, in tokens")
    known = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) or {}
    if known is None or rotary.get("rope_type") != "default" or "rope_theta" not in rotary:
        raise NotImplementedError(
            f"extend_to={extend_to} makes a plain rotary embedding turn slower, and {config.model_type} has "
            f"rope_parameters={rotary}: leave extend_to out."
        )
    if extend_to <= known:
        raise ValueError(
            f"extend_to={extend_to} is no more than the pretrained context of {known} (max_position_embeddings): leave "
            "it out, or set that back if it was changed after the conversion."
        )
    far, turned = far_layers(patterns, known), getattr(config, "no_rope_layers", None)  # in SmolLM3, 0 does not turn
    if far and (config.model_type in UNTURNED or not any(turned is None or turned[layer] for layer in far)):
        raise NotImplementedError(
            f"extend_to={extend_to} makes layers turn slower that see beyond the pretrained context of {known}, and "
            f"those of {config.model_type} have no rotary embedding: leave it out."
        )
    if not far:
        raise ValueError(
            f"extend_to={extend_to} is of layers that see beyond the pretrained context of {known}, and none does: "
            "leave it out, or let some layers stay dense."
        )


def far_layers(patterns: list[PiPattern], context: int) -> list[int]:
    """The layers that see beyond a context."""
    return [layer for layer, pattern in enumerate(patterns) if pattern.reach is None or pattern.reach >= context]


def slower_rotary(model: PreTrainedModel, extend_to: int) -> nn.Module:
    """A rotary embedding like the model's, that turns slower for a context of so many tokens; see the module.

    Raises:
        NotImplementedError: the model has none, several, or one of two features.
    """
    known: list[Any] = [module for module in rotary_modules(model) if hasattr(module, "inv_freq")]
    real = [module.inv_freq for module in known if not module.inv_freq.is_meta]  # of a model that is not being loaded
    if not known or any(not torch.equal(real[0], other) for other in real[1:]):
        raise NotImplementedError(
            f"extend_to={extend_to} makes a rotary embedding turn slower that all layers share, and "
            f"{type(model).__name__} has {len(known)} that differ: leave it out."
        )
    found, config = known[0], deepcopy(model.config)
    kind, dim = type(found), 2 * len(found.inv_freq)
    if dim == 2:
        raise NotImplementedError(f"extend_to={extend_to} needs more than two features that turn: leave it out.")
    ratio = extend_to / config.max_position_embeddings
    config.rope_parameters["rope_theta"] *= ratio ** (dim / (dim - 2))
    config.max_position_embeddings = extend_to
    rotary: nn.Module = kind(config=config)
    return rotary.to(found.inv_freq.device)


@dataclass
class SlowerAngles:
    """cos and sin for the layers that turn slower, computed once a call.

    Args:
        rotary: the embedding of those layers.
        layers: their indices.
        position_ids: [B or 1, T].
    """

    rotary: nn.Module
    layers: list[int]
    position_ids: Tensor
    known: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def like(self, usual: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin of the dtype and on the device of those that they replace."""
        key = usual[0].device, usual[0].dtype
        if key not in self.known:
            self.known[key] = self.rotary(usual[0], self.position_ids.to(usual[0].device))
        return self.known[key]


def let_turn(model: PreTrainedModel, layers: list[int]) -> None:
    """Let the attention of these layers take the angles that a converted model's call brings, if it brings some.

    Raises:
        NotImplementedError: the attention of a layer takes no angles.
    """
    found = set()
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if layer in layers and type(module).__name__.endswith("Attention"):
            if ANGLES not in inspect.signature(module.forward).parameters:
                raise NotImplementedError(f"{type(module).__name__} takes no {ANGLES}: leave extend_to out.")
            found.add(layer)
            if _turn not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_turn, with_kwargs=True)
    missed = [layer for layer in layers if layer not in found]
    if missed:
        raise NotImplementedError(f"no attention module in layer {missed[0]}: leave extend_to out.")


def _turn(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    angles = getattr(kwargs.get(CALL), "angles", None)
    if angles is None or module.layer_idx not in angles.layers or kwargs.get(ANGLES) is None:
        return args, kwargs
    return args, kwargs | {ANGLES: angles.like(kwargs[ANGLES])}
