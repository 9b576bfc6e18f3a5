"""Fusion of the two bands: out = g·ℓ + (1 − g)·s. Shared, unchanged, by every implementation in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gate_values(lse_local: Tensor, lse_skip: Tensor, gate: Tensor | None, fusion: str) -> Tensor:
    """Weight g of the local band, [B, H, T], from the log-sum-exps and the gate logits a.

    fusion="gate": g = sigmoid(a), the dynamic fusion gate of arXiv 2511.10696.
    fusion="mass": g = sigmoid(λ − μ + a); a = 0 is exactly one softmax over the union of both bands.
    A query without a skip key has g = 1, and no gradient reaches its logit.
    """
    no_skip = lse_skip == -torch.inf
    logit = torch.zeros_like(lse_local)
    if fusion == "mass":
        logit = torch.where(no_skip, 0.0, lse_local - lse_skip)
    if gate is not None:
        logit = logit + gate.to(logit.dtype)
    return torch.where(no_skip, 1.0, torch.sigmoid(logit))


def fuse(local: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    """g·ℓ + (1 − g)·s for outputs [B, H, T, D] and weights g [B, H, T], in the dtype of the outputs."""
    return torch.lerp(skip, local, weight[..., None].to(local.dtype))
