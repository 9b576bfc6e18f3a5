"""π-Attention: ring-local windows, periodic skips and a learned gate, at a cost linear in the context.

Importing this package loads torch only. `pi_attention.nn` holds the layers, `pi_attention.models` (which needs
transformers) the Hugging Face models.
"""

from pi_attention.heads import coordinated_heads, coprime_periods, dilated_heads, geometric_periods
from pi_attention.ops.api import PiAux, pi_attention
from pi_attention.pattern import Band, PiPattern
from pi_attention.segments import segments_from_cu_seqlens, segments_from_mask

__version__ = "0.2.0"

__all__ = [
    "Band",
    "PiAux",
    "PiPattern",
    "coordinated_heads",
    "coprime_periods",
    "dilated_heads",
    "geometric_periods",
    "pi_attention",
    "segments_from_cu_seqlens",
    "segments_from_mask",
]
