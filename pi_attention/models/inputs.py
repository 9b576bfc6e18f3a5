"""What a caller passes to a model: tensors of the usual shapes and dtypes, named where they are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from pi_attention.models.caching import BoundedCache
from pi_attention.ops.checks import check_layout
from pi_attention.pattern import PiPattern


def check_inputs(
    input_ids: Any,
    inputs_embeds: Any,
    attention_mask: Any,
    position_ids: Any,
    segment_ids: Any = None,
    *,
    least: int = 1,
) -> None:
    """Raise TypeError or ValueError for inputs of a model that are no dense tensors of the usual shapes and dtypes.

    A shard of a sequence may hold no token (`least` 0): its rank takes part in the exchange all the same.
    """
    for name, x, layout in (
        ("input_ids", input_ids, "[B, T]"),
        ("inputs_embeds", inputs_embeds, "[B, T, hidden]"),
        ("attention_mask", attention_mask, "[B, cached + T]"),
        ("position_ids", position_ids, "[B or 1, T]"),
        ("segment_ids", segment_ids, "[B, cached + T]"),
    ):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor {layout}, got {type(x).__name__}.")
        check_layout(name, x, layout)
        if name.endswith("_ids") and x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} has dtype {x.dtype}: cast it to int64.")
        if name != "attention_mask" and (x.dim() != layout.count(",") + 1 or min(x.shape) < least):
            raise ValueError(f"{name} must be {layout} with at least one token, got shape {tuple(x.shape)}.")


def learned_positions(model: Any) -> int | None:
    """How many positions a model has learned, as GPT-2 has; None where it has no table of them."""
    most: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = (name for name, part in model.named_modules() if isinstance(part, nn.Embedding))
    return most if any("position" in name or name.endswith("wpe") for name in tables) else None


def check_cache(cache: Any, patterns: list[PiPattern]) -> None:
    """Raise TypeError for what is no cache, ValueError for one of ours that keeps other keys than the patterns see."""
    if not isinstance(cache, Cache):
        raise TypeError(
            f"past_key_values must be a Cache of transformers, got {type(cache).__name__}: leave it out, or pass "
            "PiCache(config.patterns())."
        )
    if not isinstance(cache, BoundedCache) or torch.compiler.is_compiling():
        return
    kept = [layer.storage.pattern for layer in cache.layers]
    if kept == patterns:  # as always but for a mistake; their reaches would be computed for every token
        return
    wanted, found = ([(pattern.reach, pattern.sinks) for pattern in of] for of in (patterns, kept))
    if wanted != found:
        raise ValueError(
            f"past_key_values keeps the keys of {len(kept)} layers by {', '.join(map(str, dict.fromkeys(kept)))}, but "
            f"the model has {len(patterns)} by {', '.join(map(str, dict.fromkeys(patterns)))}: pass "
            "PiCache(config.patterns()) of this model."
        )


def without_padding(segment_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """Segment ids [B, cached + T], −1 where a mask that is given beside them says padding."""
    if segment_ids is None or attention_mask is None:
        return segment_ids
    if attention_mask.shape != segment_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} and segment_ids {tuple(segment_ids.shape)} must have one "
            "shape [B, cached + T]: correct one, or leave it out."
        )
    return torch.where(attention_mask != 0, segment_ids, -1)
