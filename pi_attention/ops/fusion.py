"""Fusion of the two bands: out = g·ℓ + (1 − g)·s. Shared, unchanged, by every implementation in plain PyTorch.

A sink logit z, one a head, is a term of a softmax that has no value: it leaves the keys sigmoid(lse − z) of the weight,
lse being the log-sum-exp of all their scores.
"""

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


def beside_gate(out: Tensor, gate: Tensor | None) -> Tensor:
    """The output; a gate that fuses nothing gets a zero gradient, by an empty sum, and not none at all."""
    if gate is None or not gate.requires_grad or not torch.is_grad_enabled():
        return out
    return out + gate[..., :0].sum().to(out.dtype)


def fuse(local: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    """g·ℓ + (1 − g)·s for outputs [B, H, T, D] and weights g [B, H, T], in the dtype of the outputs."""
    return torch.lerp(skip, local, weight[..., None].to(local.dtype))


def without_sink(out: Tensor, lse: Tensor, sink_logit: Tensor | None) -> Tensor:
    """Outputs [B, H, T, D] of softmaxes with log-sum-exp `lse` [B, H, T], after a sink logit [H] has its share."""
    if sink_logit is None:
        return out
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    share = torch.sigmoid(safe - sink_logit.to(lse.dtype)[:, None])
    return out * share[..., None].to(out.dtype)


def fuse_bands(
    local: Tensor,
    skip: Tensor,
    lse_local: Tensor,
    lse_skip: Tensor,
    gate: Tensor | None,
    fusion: str,
    sink_logit: Tensor | None,
) -> Tensor:
    """The fused output [B, H, T, D].

    fusion="mass": the sink logit is one more term of the one softmax, in which the gate logit raises local scores.
    fusion="gate": it is one more term of each band's softmax.
    """
    weight = gate_values(lse_local, lse_skip, gate, fusion)
    if fusion == "mass":
        lse = lse_local if sink_logit is None else _lse_of_both(lse_local, lse_skip, gate)
        return without_sink(fuse(local, skip, weight), lse, sink_logit)
    local, skip = without_sink(local, lse_local, sink_logit), without_sink(skip, lse_skip, sink_logit)
    return fuse(local, skip, weight)


def _lse_of_both(lse_local: Tensor, lse_skip: Tensor, gate: Tensor | None) -> Tensor:
    """log(exp(λ + a) + exp(μ)); λ where there is no skip key."""
    no_skip = lse_skip == -torch.inf
    raised = lse_local
    if gate is not None:  # masked before the sum: −∞ + ∞ of a padding query would be NaN, and its gradient, too
        raised = lse_local + gate.to(lse_local.dtype).masked_fill(no_skip, 0.0)
    return torch.where(no_skip, lse_local, torch.logaddexp(raised, lse_skip.masked_fill(no_skip, 0.0)))
