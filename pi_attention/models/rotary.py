"""Rotary embedding of the models, with the scalings (linear, dynamic, YaRN, …) that transformers knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from pi_attention.models.configuration_pi import PiConfig
from pi_attention.nn.rope import angles_at, rotary_frequencies

MOVING = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on the length."""


def keep_in_fp32(module: nn.Module, before: dict[str, Tensor]) -> None:
    """After a module was cast: its buffers in fp32, on the new device.

    Frequencies rounded to bf16 turn position 8,000 by another radian.
    """
    for name, buffer in before.items():
        moved = getattr(module, name)
        narrowed = moved.is_floating_point() and moved.element_size() < 4
        if narrowed or buffer.dtype == torch.float32 != moved.dtype:
            exact = torch.empty_like(moved, dtype=torch.float32) if buffer.is_meta else buffer.to(moved.device).float()
            setattr(module, name, exact)


def moving_rope_types(config: Any) -> list[str]:
    """Those of a text configuration whose frequencies depend on the longest text in a batch."""
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rotary, *rotary.values()) if isinstance(part, dict)}
    return [kind for kind in MOVING if kind in kinds]


class PiRotaryEmbedding(nn.Module):
    """cos and sin of positions, scaled as `config.rope_parameters` says; attributes as transformers expects them."""

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: PiConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        frequencies = self.compute_default_rope_parameters
        if self.rope_type != "default":
            frequencies = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: PiConfig, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        """Inverse frequencies [D / 2] and the factor of cos and sin."""
        return rotary_frequencies(config.head_dim, float(config.rope_parameters["rope_theta"])), 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but keep the frequencies in fp32."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        keep_in_fp32(self, before)
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, T, D] in the dtype of x, computed in fp32."""
        cos, sin = angles_at(position_ids, self.inv_freq.to(device=x.device, dtype=torch.float32))
        return (cos * self.attention_scaling).to(x.dtype), (sin * self.attention_scaling).to(x.dtype)
