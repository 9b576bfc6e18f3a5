"""The case where the window covers every key: ordinary attention, which PyTorch's own kernels serve best."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pi_attention.masks import dense_masks
from pi_attention.pattern import PiPattern


def covers_everything(pattern: PiPattern, key_length: int) -> bool:
    """True when the local band of each query holds all the keys that it may see, so that no skip key is left."""
    return pattern.window >= key_length


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: PiPattern, starts: Tensor | None, scale: float
) -> Tensor:
    """out [B, H, T, D] by `scaled_dot_product_attention`, for a pattern that `covers_everything`."""
    length, key_length = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if starts is None and (not pattern.causal or length == 1 or length == key_length):
        causal = pattern.causal and length > 1
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)
    visible, _ = dense_masks(pattern, length, key_length, starts=starts, device=query.device)
    empty = ~visible.any(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, visible | empty, scale=scale, enable_gqa=grouped)
    return out.masked_fill(empty, 0.0)
