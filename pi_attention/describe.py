"""The patterns of a stack of layers in words."""

from __future__ import annotations

from collections.abc import Sequence

from pi_attention.pattern import PiPattern

EVERYTHING = 2**30
"""A window from which on a layer is called dense, whatever the context."""


def is_dense(pattern: PiPattern, context: int = EVERYTHING) -> bool:
    """Whether a query sees every token of the context, by its window."""
    return pattern.window >= context


def layers_alike(patterns: Sequence[PiPattern]) -> dict[PiPattern, list[int]]:
    """The patterns of a stack that differ, each with its layers."""
    found: dict[PiPattern, list[int]] = {}
    for layer, pattern in enumerate(patterns):
        found.setdefault(pattern, []).append(layer)
    return found


def by_layers(patterns: Sequence[PiPattern]) -> dict[PiPattern, str]:
    """The same in words: "layer 3", "layers 0, 1", "layers 0 to 4, 6"."""
    alike = layers_alike(patterns).items()
    return {pattern: f"layer{'s' if layers[1:] else ''} {in_runs(layers)}" for pattern, layers in alike}


def in_runs(numbers: Sequence[int]) -> str:
    """Increasing numbers in words, three and more successive ones as a run.

    >>> in_runs([0, 1, 2, 3, 5, 7, 8])
    '0 to 3, 5, 7, 8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = (f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return ", ".join(words)


def in_words(pattern: PiPattern, context: int = EVERYTHING) -> str:
    """What a query sees: "the last 16 tokens, 64 keys at multiples of 4 beyond them"."""
    if is_dense(pattern, context):
        return "every token up to itself" if pattern.causal else "every token"
    side = "the last" if pattern.causal else "on each side the nearest"
    words = [f"{side} {pattern.window:,} tokens"]
    if pattern.skips != 0:
        count = "every" if pattern.skips is None else f"{pattern.skips}"
        lags = f"multiples of {_of_heads(pattern.period, 'period')}"
        if any(pattern.phases):
            lags += f" plus {_of_heads(pattern.phase, 'phase')}"
        words.append(f"{count} key{'' if pattern.skips is None else 's'} at {lags} beyond them")
    if pattern.sinks:
        words.append(f"the first {pattern.sinks}")
    return ", ".join(words)


def _of_heads(value: int | tuple[int, ...], name: str) -> str:
    """A period or a phase in words, whether one for all heads or one a head."""
    return f"{', '.join(map(str, value))} (one {name} a head)" if isinstance(value, tuple) else str(value)
