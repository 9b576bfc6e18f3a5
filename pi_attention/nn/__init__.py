"""Layers of π-Attention for any PyTorch model."""

from pi_attention.nn.attention import PiAttention, record_aux
from pi_attention.nn.gate import FusionGate
from pi_attention.nn.layers import SwiGLU
from pi_attention.nn.rope import apply_rotary, rotary_angles

__all__ = ["FusionGate", "PiAttention", "SwiGLU", "apply_rotary", "record_aux", "rotary_angles"]
