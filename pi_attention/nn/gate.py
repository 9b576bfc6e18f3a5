"""The dynamic fusion gate: from a token's hidden state to one logit per head."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from pi_attention.pattern import PiPattern

GATE_WIDTH = 32
"""Hidden units of the gate."""


def neutral_bias(pattern: PiPattern, fusion: str) -> float:
    """The gate logit at which a fresh layer attends as one softmax over both bands would.

    "mass" is one softmax at a = 0. "gate" is one for equal scores when sigmoid(a) = window / (window + skips), that is
    a = log(window / skips): an untrained gate then neither drowns the few skip keys nor overrates them.
    """
    if fusion == "mass" or not pattern.skips:
        return 0.0
    return math.log(pattern.window / pattern.skips)


class GateLogits(nn.Linear):
    """The gate's second layer: it starts at zero weights and a constant bias, so every token starts at that logit."""

    def __init__(self, width: int, num_heads: int, initial_bias: float) -> None:
        self.initial_bias = initial_bias
        super().__init__(width, num_heads)

    def reset_parameters(self) -> None:
        """Zero weights, constant bias."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.initial_bias)


class FusionGate(nn.Module):
    """Two-layer perceptron from a token's hidden state to the gate logits of its heads (arXiv 2511.10696).

    Args:
        hidden_size: features of the hidden state.
        num_heads: H.
        bias: initial logit; see `neutral_bias`.
        gate_features: look at the first so many features only; None looks at all of them.
        width: of the hidden layer.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        bias: float = 0.0,
        gate_features: int | None = None,
        width: int = GATE_WIDTH,
    ) -> None:
        super().__init__()
        if gate_features is not None and not 1 <= gate_features <= hidden_size:
            raise ValueError(
                f"gate_features must be from 1 to hidden_size={hidden_size}, or None; got {gate_features}."
            )
        self.gate_features = gate_features or hidden_size
        self.fc_in = nn.Linear(self.gate_features, width)
        self.fc_out = GateLogits(width, num_heads, bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits a [B, H, T] of hidden states [B, T, hidden_size]."""
        return self.fc_out(F.silu(self.fc_in(hidden_states[..., : self.gate_features]))).transpose(1, 2)
