"""The attention layer of the models: under "eager" the output passes through a map that transformers can record."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pi_attention.masks import dense_masks
from pi_attention.nn.attention import PiAttention
from pi_attention.ops.fusion import fuse, gate_values
from pi_attention.ops.reference import band_reference
from pi_attention.segments import segment_starts


class AttentionMap(nn.Identity):
    """The fused attention map [B, H, T, S] of a layer: what `output_attentions=True` returns."""


class PiSelfAttention(PiAttention):
    """PiAttention that under attn_implementation="eager" multiplies its map with the values."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.map = AttentionMap()

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, hidden_states: Tensor, segment_ids: Tensor | None
    ) -> Tensor:
        if self.impl != "reference" or self.aux is not None:
            return super()._attend(query, key, value, hidden_states, segment_ids)
        gate = None if self.gate is None else self.gate(hidden_states)
        starts = None if segment_ids is None else segment_starts(segment_ids)
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        masks = dense_masks(self.pattern, query.shape[2], key.shape[2], starts=starts, device=query.device)
        eye = torch.eye(key.shape[2], dtype=value.dtype, device=value.device).expand(*key.shape[:2], -1, -1)
        scale = query.shape[-1] ** -0.5
        (local, lse_local), (skip, lse_skip) = (band_reference(query, key, eye, mask, scale) for mask in masks)
        weight = gate_values(lse_local, lse_skip, gate, "mass" if gate is None else self.fusion)
        return self.map(fuse(local, skip, weight)) @ value
