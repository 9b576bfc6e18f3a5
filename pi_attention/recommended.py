"""The form of attention that language models measured best for a goal (docs/results.md, "What to use")."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from pi_attention.heads import coordinated_heads
from pi_attention.pattern import PiPattern, need_int
from pi_attention.stack import Kind, stacked

Goal = Literal["quality", "few-products", "bounded-cache", "least"]
EVERY = 6
"""One layer in so many sees everything, unless told."""
MEASURED = {"quality": (6, 12), "few-products": (6,)}
"""The values of `every` that were measured."""
BEST_PERIOD = 4
"""Of four heads that share the distance; other numbers of heads were not measured with several."""
SHARED = ("few-products", "bounded-cache")
"""Goals whose forms have heads that share the distance."""


@dataclass(frozen=True)
class Form:
    """A pattern, what each layer takes of it, and what was measured.

    Args:
        pattern: of the model.
        kinds: of the layers, repeated over them.
        measured: in a sentence, without full stop.
        scale: of the measurements, in the same way, and what was not measured.
    """

    pattern: PiPattern
    kinds: tuple[Kind, ...]
    measured: str
    scale: str

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `PiConfig` or of `train` that say it; heads that share the distance are their default."""
        if self.kinds == ("dense",):
            return {"layer_patterns": ["dense"]}
        fields: dict[str, Any] = {"window": self.pattern.window}
        if "all-skips" not in self.kinds:
            fields["skips"] = self.pattern.skips
        if self.pattern.sinks:
            fields["sinks"] = self.pattern.sinks
        return fields if self.kinds == ("pi",) else fields | {"layer_patterns": list(self.kinds)}

    def patterns(self, layers: int) -> list[PiPattern]:
        """Of so many layers."""
        return stacked(self.kinds, self.pattern, layers)


def recommended(goal: Goal, *, keys: int, heads: int, layers: int = EVERY, sinks: int = 0, every: int = EVERY) -> Form:
    """The form for a goal.

    Args:
        goal: "quality" for the lowest perplexity; "few-products" for one near it where products of a long prompt
            count; "bounded-cache" where no layer may keep everything; "least" for the lowest cost.
        keys: most keys of a query, sinks aside, in layers that do not see everything.
        heads: query heads.
        layers: of the model; where there are fewer than `every`, one of them sees everything.
        sinks: first tokens that every query sees, too.
        every: one layer in so many sees everything, with "quality" and "few-products"; the other goals have no such
            layer. 6 was measured, and 12 with "quality".

    Raises:
        TypeError: a number is no int.
        ValueError: a number is too small, the goal is unknown, or one head would share the distance.

    >>> recommended("quality", keys=320, heads=8).kinds
    ('local', 'local', 'local', 'dense', 'local', 'local')
    >>> recommended("bounded-cache", keys=80, heads=4).pattern
    PiPattern(window=16, period=4, skips=64, causal=True, ring=False, sinks=0, phase=(0, 1, 2, 3))
    """
    need_int("keys", keys, 2, "a window and a skip are two keys")
    need_int("layers", layers, 1, "a model has layers")
    need_int("heads", heads, 1, "a model has heads")
    need_int("every", every, 1, "one layer in so many sees everything")
    if heads == 1 and goal in SHARED:
        raise ValueError(f"heads=1 shares no distance, as goal={goal!r} needs: take quality or least, or more heads.")
    count = min(every, layers)
    local: tuple[Kind, ...] = ("local",)
    before, after = local * (count // 2), local * (count - count // 2 - 1)
    scale = "Measured with 80 keys at 2,048 tokens and {} M parameters"
    both = f"{scale.format('up to 34')}, and with 320 keys at 8,192 tokens and 9 M"
    window, fifth = PiPattern(keys, 1, 0, sinks=sinks), max(1, keys // 5)
    forms = {
        "quality": lambda: Form(
            window,
            (*before, "dense", *after),
            "Windows with one dense layer in six, or in twelve, were as good as dense attention after as many steps. "
            "With one in six they were better after equal time",
            f"{scale.format('up to 14')}; equal time with 320 keys at 8,192 tokens and 9 M, too",
        ),
        "few-products": lambda: Form(
            coordinated_heads(keys, None, heads, sinks=sinks),
            (*before, "all-skips", *after),
            "Windows with one layer in six of coordinated heads that see everything were 3.0 ± 2.4 % above dense "
            "attention in perplexity. They were 5.5 ± 0.4 % above windows with one dense layer in twelve",
            f"{scale.format(14)}, where that layer had a window of 16 and period 4",
        ),
        "bounded-cache": lambda: Form(
            coordinated_heads(fifth, keys - fifth, heads, sinks=sinks),
            ("pi",),
            "Coordinated heads closed 43 to 56 % of the gap from a window to dense attention with 80 keys. With 320 "
            "keys it was 36 ± 37 %, and 65 ± 23 % after equal time",
            both,
        ),
        "least": lambda: Form(window, ("pi",), "A window had the highest perplexity of these forms", both),
    }
    if goal not in forms:
        raise ValueError(f"goal={goal!r} is unknown: use one of {list(get_args(Goal))}.")
    form = forms[goal]()
    if count == 1 or count in MEASURED.get(goal, (count,)):
        return form
    return replace(form, scale=f"{form.scale}. One such layer in {count} was not measured")
