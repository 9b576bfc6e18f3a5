"""The attention variants that every experiment compares: patterns and flags of one model, at one key budget.

Ring-local appears twice: with the window of π-attention, and with all of its keys, window + skips. What a variant
without a gate saves in parameters goes into the width of its feed-forward network.
"""

from __future__ import annotations

from typing import Any

from pi_attention.models import PiConfig
from pi_attention.pattern import PiPattern, coprime_periods, geometric_periods

VARIANTS = (
    "dense",
    "ring-local, same window",
    "ring-local, same keys",
    "pi",
    "pi, no gate",
    "pi, fixed half",
    "pi, mass gate",
    "pi, coprime heads",
    "pi, geometric heads",
    "window + sinks",
)


def config(variant: str, pattern: PiPattern, context: int, **sizes: Any) -> PiConfig:
    """The model of a variant.

    Args:
        variant: one of VARIANTS.
        pattern: window, period and skips of π-attention.
        context: tokens, for the largest of the geometric periods.
        sizes: of the model (`PiConfig`), the same for all variants.

    Raises:
        ValueError: there is no such variant.
    """
    w, period, m = pattern.window, pattern.period_of(0), pattern.skips or 0
    heads = sizes["num_attention_heads"]
    chosen: dict[str, dict[str, Any]] = {
        "dense": {"layer_patterns": ["dense"], "gate": False},
        "ring-local, same window": {"window": w, "skips": 0, "gate": False},
        "ring-local, same keys": {"window": w + m, "skips": 0, "gate": False},
        "pi": {"fusion": "gate"},
        "pi, no gate": {"gate": False},
        "pi, fixed half": {"fusion": "gate"},
        "pi, mass gate": {"fusion": "mass"},
        "pi, coprime heads": {"period": list(coprime_periods(period, heads))},
        "pi, geometric heads": {
            "period": list(geometric_periods(period, max(period, (context - 1) // max(1, m)), heads))
        },
        "window + sinks": {"window": w + m - min(4, m), "skips": 0, "sinks": min(4, m), "gate": False},
    }
    if variant not in chosen:
        raise ValueError(f"variant={variant!r} is unknown: use one of {list(VARIANTS)}.")
    fields = {"window": w, "period": period, "skips": m} | sizes | chosen[variant]
    made = PiConfig(**fields)
    if not made.gate:  # two layers of the gate, with biases, in each of its layers
        gate = (made.hidden_size + 1) * 32 + 33 * heads
        made.intermediate_size += round(gate / (3 * made.hidden_size))
    return made


def freeze_half(model: Any) -> None:
    """Fix every gate at one half, for the variant "pi, fixed half"."""
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            parameter.data.zero_()
            parameter.requires_grad_(False)
