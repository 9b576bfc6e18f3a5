"""Soft-capped scores, shared by every implementation in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cap(scores: Tensor, softcap: float | None) -> Tensor:
    """cap·tanh(scores / cap), of scaled scores that are not masked yet; unchanged without a cap (arXiv 2408.00118)."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
