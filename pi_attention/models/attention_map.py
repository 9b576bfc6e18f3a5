"""The attention layer of the models: under "eager" the output passes through a map that transformers can record."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pi_attention.nn.attention import PiAttention
from pi_attention.ops.paged import Pages
from pi_attention.ops.reference import reference_attention
from pi_attention.segments import segment_starts


class AttentionMap(nn.Identity):
    """The fused attention map [B, H, T, S] of a layer: what `output_attentions=True` returns."""


class PiSelfAttention(PiAttention):
    """PiAttention that under attn_implementation="eager" multiplies its map with the values."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.map = AttentionMap()

    def operator(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None,
        segment_ids: Tensor | None,
        pages: Pages | None = None,
    ) -> Tensor:
        if self.impl != "reference" or self.aux is not None:
            return super().operator(query, key, value, gate, segment_ids, pages)
        if pages is not None:
            key, value, segment_ids = pages.gathered(key, value)
        unit = torch.eye(key.shape[2], dtype=value.dtype, device=value.device).expand(*key.shape[:2], -1, -1)
        attention_map, _, _ = reference_attention(
            query,
            key,
            unit,
            self.pattern,
            gate=gate,
            fusion="mass" if gate is None else self.fusion,
            starts=None if segment_ids is None else segment_starts(segment_ids),
            scale=query.shape[-1] ** -0.5,
            **self.scores(),
        )
        exact = torch.promote_types(value.dtype, torch.float32)  # as the reference computes
        value = value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return (self.map(attention_map).to(exact) @ value.to(exact)).to(query.dtype)
