"""Forms of the pattern at one budget of keys, and the ways to fuse its bands: a variant is a form, or form and fusion.

A form is the patterns of successive layers, repeated over the model; a hybrid has one layer in n that sees everything.
"""

from __future__ import annotations

from typing import Any

from experiments.experiment import Settings
from pi_attention.heads import coordinated_heads, dilated_heads
from pi_attention.pattern import PiPattern
from pi_attention.stack import DENSE

BASELINE = "ring-local, same keys"
FUSIONS: dict[str, dict[str, Any]] = {
    "": {"gate": False},
    ", mass gate": {"gate": True, "fusion": "mass"},
    ", gate": {"gate": True, "fusion": "gate"},
}
"""One softmax over both bands; a gate that starts from it; the paper's gate."""
WHOLE = {"dense": None, "coordinated 4": 4, "coordinated 8": 8}
"""Layers that see everything, by the period of their skips."""
EVERY = (4, 6, 12)
"""One layer of so many sees everything."""


def single_layers(keys: int, heads: int, context: int) -> dict[str, list[PiPattern]]:
    """Forms without a layer that sees more than `keys` keys, but for dense attention."""
    fifth = max(1, keys // 5)

    def coordinated(period: int | list[int], window: int = fifth) -> PiPattern:
        return coordinated_heads(window, keys - window, heads, period)

    ring = PiPattern(keys, 1, 0)
    forms = {
        "dense": [DENSE],
        BASELINE: [ring],
        "single period": [PiPattern(keys - fifth, keys - fifth, fifth)],
        "period 4": [PiPattern(fifth, 4, keys - fifth)],  # coordinated heads without their phases
        "dilated": [dilated_heads(1, keys - 1, heads, context)],
        "dilated heads": [dilated_heads(fifth, keys - fifth, heads, context)],
        "ring-local and coordinated 4 by layer": [ring, coordinated(4)],
        "coordinated 4 and 16 by layer": [coordinated(4), coordinated(16)],
        "coordinated 4, window 1/10": [coordinated(4, max(1, keys // 10))],
        "coordinated 4, window 2/5": [coordinated(4, 2 * fifth)],
        "coordinated 4, window 3/5": [coordinated(4, 3 * fifth)],
    }
    forms |= {f"coordinated {period}": [coordinated(period)] for period in (2, 4, 8, 12)}
    if heads % 8 == 0:
        forms["coordinated 4 and 16 by head"] = [coordinated([4, 16])]
    return forms


def forms(keys: int, heads: int, context: int) -> dict[str, list[PiPattern]]:
    """The patterns of successive layers, by the name of the form; every query of a head sees `keys` keys at most.

    A fifth of the keys are the window where nothing else is said.
    """
    found = single_layers(keys, heads, context)
    for whole, period in WHOLE.items():
        seen = DENSE if period is None else coordinated_heads(max(1, keys // 5), None, heads, period)
        for rest in (BASELINE, "dilated heads", "coordinated 4"):
            for n in EVERY:
                layers = found[rest] * n
                found[f"{rest} + {whole}, 1 in {n}"] = [*layers[: n // 2], seen, *layers[n // 2 + 1 :]]
    return found


def attention(settings: Settings) -> dict[str, Any]:
    """What a variant says of the attention, as fields of `PiConfig`.

    Args:
        settings: variant, keys, heads, context.

    Raises:
        ValueError: there is no such variant.
    """
    variant, known = settings["variant"], forms(settings["keys"], settings["heads"], settings["context"])
    for suffix, fusion in FUSIONS.items():
        form = variant.removesuffix(suffix)
        if form in known:
            first, *others = known[form]
            cycle = {"layer_patterns": [pattern.to_dict() for pattern in (first, *others)]} if others else {}
            return first.to_dict() | fusion | cycle
    raise ValueError(f"variant={variant!r} is unknown: use one of {list(known)}, with or without {list(FUSIONS)[1:]}.")
