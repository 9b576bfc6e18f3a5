"""Rotary position embedding (RoPE, arXiv 2104.09864), in the half-rotation layout of Llama and Hugging Face."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(position: Tensor, dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin, [..., dim] in fp32, for integer positions [...]."""
    return angles_at(position, rotary_frequencies(dim, theta, position.device))


def rotary_frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Inverse frequencies [dim / 2] in fp32."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def angles_at(position: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, [..., dim] in fp32, for positions [...] and frequencies [dim / 2]."""
    angle = position[..., None].float() * frequencies
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, heads, T, D] by the angles whose cos and sin are [B or 1, T, D]; in the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def moved_rotary(x: Tensor, by: Tensor, frequencies: Tensor) -> Tensor:
    """Keys x [B, heads, T, D], rotated for their positions, as they were `by` [B or 1, T] positions later.

    Only the first 2 · len(frequencies) features are rotated, as in models with a partial rotary embedding.
    """
    dim = 2 * len(frequencies)
    cos, sin = angles_at(by, frequencies.to(x.device))
    turned = apply_rotary(x[..., :dim], cos, sin)
    return turned if dim == x.shape[-1] else torch.cat([turned, x[..., dim:]], dim=-1)
