"""The parts of a transformer layer that PyTorch lacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """Gated feed-forward network, down(silu(gate(x)) · up(x)) (arXiv 2002.05202), without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SinkLogit(nn.Module):
    """A learned term in the denominator of each head's softmax, as in gpt-oss: `sink_logit` of `pi_attention`."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero: a term exp(0), as of one key with a score of 0."""
        nn.init.zeros_(self.weight)

    def forward(self) -> Tensor:
        """[H]."""
        return self.weight
