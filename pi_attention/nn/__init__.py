"""Layers of π-Attention for any PyTorch model."""

from pi_attention.nn.attention import PiAttention, record_aux
from pi_attention.nn.gate import FusionGate
from pi_attention.nn.layers import SinkLogit, SwiGLU
from pi_attention.nn.rope import apply_rotary, rotary_angles

__all__ = ["FusionGate", "PiAttention", "SinkLogit", "SwiGLU", "apply_rotary", "record_aux", "rotary_angles"]
