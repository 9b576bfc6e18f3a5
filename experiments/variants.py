"""The attention variants that every experiment compares: patterns and flags of one model, at one key budget.

Ring-local appears twice: with the window of π-attention, and with all of its keys, window + skips. What a variant
without a gate saves in parameters goes into the width of its feed-forward network.
"""

from __future__ import annotations

from typing import Any

from experiments.runner import Settings
from pi_attention.models import PiConfig
from pi_attention.nn.gate import GATE_WIDTH
from pi_attention.pattern import coprime_periods, geometric_periods

BASELINE = "ring-local, same keys"
VARIANTS = (
    "dense",
    "ring-local, same window",
    BASELINE,
    "pi",
    "pi, no gate",
    "pi, fixed half",
    "pi, mass gate",
    "pi, coprime heads",
    "pi, geometric heads",
    "window + sinks",
    "dilated",
)
MAIN = ("dense", BASELINE, "pi", "pi, coprime heads")
"""The variants of experiments that do not study the gate."""


def config(settings: Settings, **more: Any) -> PiConfig:
    """The model of a row.

    Args:
        settings: variant, window, period, skips, context (for the largest geometric period), hidden, layers, heads.
        more: fields of `PiConfig`, such as vocab_size.

    Raises:
        ValueError: there is no such variant.
    """
    variant, heads, context = settings["variant"], settings["heads"], settings["context"]
    w, period, m = settings["window"], settings["period"], settings["skips"]
    farthest = max(period, (context - 1) // max(1, m))
    chosen: dict[str, dict[str, Any]] = {
        "dense": {"layer_patterns": ["dense"], "gate": False},
        "ring-local, same window": {"skips": 0, "gate": False},
        BASELINE: {"window": w + m, "skips": 0, "gate": False},
        "pi": {"fusion": "gate"},
        "pi, no gate": {"gate": False},
        "pi, fixed half": {"fusion": "gate"},
        "pi, mass gate": {"fusion": "mass"},
        "pi, coprime heads": {"period": list(coprime_periods(period, heads))},
        "pi, geometric heads": {"period": list(geometric_periods(period, farthest, heads))},
        "window + sinks": {"window": w + m - min(4, m), "skips": 0, "sinks": min(4, m), "gate": False},
        "dilated": {
            "window": 1,
            "skips": w + m - 1,
            "period": list(geometric_periods(1, max(1, (context - 1) // (w + m - 1)), heads)),
            "gate": False,
        },
    }
    if variant not in chosen:
        raise ValueError(f"variant={variant!r} is unknown: use one of {list(VARIANTS)}.")
    sizes = {
        "hidden_size": settings["hidden"],
        "num_hidden_layers": settings["layers"],
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "qk_norm": True,
        "use_cache": False,
    }
    fields = {"window": w, "period": period, "skips": m} | sizes | more | chosen[variant]
    made = PiConfig(**fields)
    if not made.gate:  # the two layers of the gate, with biases
        gate = (made.hidden_size + 1) * GATE_WIDTH + (GATE_WIDTH + 1) * heads
        made.intermediate_size += 8 * round(gate / (24 * made.hidden_size))  # a width that tensor cores like
    return made


def prepare_gate(model: Any, variant: str) -> Any:
    """The model, with every gate fixed at one half where the variant says so."""
    if variant == "pi, fixed half":
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                parameter.data.zero_()
                parameter.requires_grad_(False)
    return model
