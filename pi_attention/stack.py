"""The patterns of a stack of layers, by the kind of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from pi_attention.pattern import PiPattern

Kind = Literal["pi", "local", "all-skips", "dense"]
"""The pattern of the model, its window alone, its window with every skip back to the start, or everything."""

DENSE = PiPattern(window=2**40, period=1, skips=0)
"""A window over any context: dense causal attention."""


def stacked(kinds: Sequence[str | dict[str, Any]] | None, pattern: PiPattern, layers: int) -> list[PiPattern]:
    """The pattern of every layer.

    Args:
        kinds: of the layers, repeated over them: each a `Kind`, or a dict of fields in which it differs from `pattern`.
            With a period it has the phase 0 unless one is given. "pi" where there are none.
        pattern: of the model.
        layers: how many.

    Raises:
        TypeError, ValueError: a kind is unknown or contradicts itself, or "all-skips" has none.

    >>> [layer.skips for layer in stacked(["local", "pi", {"skips": 3}], PiPattern(4, 4, 2), 4)]
    [0, 2, 3, 0]
    """
    kinds = kinds or ["pi"]
    return [_of_kind(kinds[layer % len(kinds)], pattern) for layer in range(layers)]


def check_used(settings: Any, layers: int) -> None:
    """Raise ValueError for settings that no layer has: more kinds than layers, or numbers of skips or of a window.

    Args:
        settings: a dataclass whose fields have defaults: `layer_patterns`, and those of a pattern. A field that equals
            its default counts as not given.
        layers: of the model.
    """
    kinds, default = set(settings.layer_patterns), type(settings)()
    if len(settings.layer_patterns) > layers:
        raise ValueError(
            f"layer_patterns has {len(settings.layer_patterns)} entries, and layers={layers}: the last ones would not "
            "be used. Give as many layers, or a multiple."
        )
    counted = "pi" in kinds and settings.skips != 0
    skips = counted or "all-skips" in kinds
    of_skips = "skips, and no layer has any: leave it out, or give skips to a layer"
    for used, names, of in (
        (skips, ("period", "phase", "gate"), of_skips),
        (skips or settings.skips == 0, ("skips",), of_skips),
        (
            counted or not skips or settings.skips in (0, None),
            ("skips",),
            'a "pi" layer, and there is none: leave it out',
        ),
        (kinds != {"dense"}, ("window", "sinks"), "a window, and all layers are dense: leave it out"),
    ):
        for name in names:
            value = getattr(settings, name, None)
            if not used and value != getattr(default, name, None):
                raise ValueError(f"{name}={value!r} is of {of}.")


def _of_kind(kind: str | dict[str, Any], pattern: PiPattern) -> PiPattern:
    if isinstance(kind, dict):
        of_period = {"phase": 0} if "period" in kind else {}
        return PiPattern.from_dict(pattern.to_dict() | of_period | kind)
    if kind == "pi":
        return pattern
    if kind == "local":
        return replace(pattern, period=1, skips=0, phase=0)
    if kind == "all-skips":
        if pattern.skips == 0:
            raise ValueError('layer_patterns holds "all-skips", and skips=0: leave skips out, or give another number.')
        return replace(pattern, skips=None)
    if kind == "dense":
        return replace(DENSE, causal=pattern.causal, ring=pattern.ring)
    known = ", ".join(f'"{name}"' for name in get_args(Kind))
    raise ValueError(f"layer_patterns holds {kind!r}: use {known}, or a dict of pattern fields.")
