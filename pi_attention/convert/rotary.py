"""The frequencies of a pretrained model's rotary embedding, by which keys can be moved."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pi_attention.models.rotary import MOVING


def rotary_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The rotary embeddings in a model of transformers, whose classes are named alike: outer ones first."""
    level, seen = [model], {model}
    while level:
        yield from (module for module in level if type(module).__name__.endswith("RotaryEmbedding"))
        level = list(dict.fromkeys(child for module in level for child in module.children() if child not in seen))
        seen.update(level)


def layer_frequencies(model: PreTrainedModel, layers: int) -> list[Tensor | None] | None:
    """Inverse frequencies of each layer's rotary embedding, None for a layer without.

    None instead of the list where keys cannot be moved: the frequencies depend on the length, or the features are
    paired in another way than in Llama.
    """
    if not _pairs_halves(model):
        return None
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * layers
    rotated = getattr(model.config, "no_rope_layers", None) or [1] * layers  # in SmolLM3, 0 is a layer without
    for module in rotary_modules(model):
        if getattr(module, "rope_type", "") not in MOVING:
            names = [name if hasattr(module, name) else "inv_freq" for name in (f"{kind}_inv_freq" for kind in kinds)]
            if hasattr(module, names[0]):
                found = zip(names, rotated, strict=True)
                return [getattr(module, name).float() if turned else None for name, turned in found]
    return None


def _pairs_halves(model: PreTrainedModel) -> bool:
    """Whether feature i turns with feature i + D/2, as in Llama, asked of the functions of the model's file."""
    functions, features = vars(sys.modules[type(model).__module__]), torch.arange(4.0)
    if "rotate_half" in functions:
        turned = functions["rotate_half"](features)
    elif "_apply_rotary_emb" in functions:  # gpt-oss, by cos and sin of half the features
        turned = functions["_apply_rotary_emb"](features, torch.zeros(2), torch.ones(2))
    else:
        return False
    return bool(turned.tolist() == [-2.0, -3.0, 0.0, 1.0])
