"""Language models by the form of the pattern: at one length, over lengths and keys, in hybrids, by size and by time.

Each is tested on all of the test documents. The cells that say most come first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.experiment import Experiment, Scale, Settings
from experiments.forms import BASELINE, FUSIONS, WHOLE, single_layers
from experiments.language_modelling import EXPERIMENT, SIZES

SMALL: Settings = SIZES["small"] | {"corpus": "kernel", "steps": 4000}
TESTED = 2**22
"""Most tokens of an evaluation: at 2,048 tokens, four blocks of every test document."""
MAIN = (BASELINE, "coordinated 4", "dense")


def cell(scale: Scale, variant: str, context: int = 2048, keys: int = 80, **more: Any) -> Settings:
    """The settings of one variant; a thirty-second of most lengths at the scale "smoke"."""
    if scale == "small":
        return {"variant": variant, "keys": keys, "context": context, **SMALL, "blocks": TESTED // context, **more}
    heads = more.get("heads", 4)
    toy = {"hidden": 8 * heads, "heads": heads, "layers": more.get("layers", 2)}
    toy |= {"seconds": 0.1} if "seconds" in more else {}
    toy |= {"shorter first": [n // 32 for n in more["shorter first"]]} if "shorter first" in more else {}
    return {"variant": variant, "keys": max(5, keys // 16), "context": context // 32, **SIZES["smoke"], **toy}


FUSED = ("coordinated 4", "single period", "dilated heads", "coordinated 2")
"""Forms that are measured with every fusion."""
OF_HEADS = {
    8: (*MAIN, "coordinated 8", "coordinated 4 and 16 by head", "coordinated 2", "dilated heads"),
    12: (*MAIN, "coordinated 12", "coordinated 2", "dilated heads"),
}
"""Forms by the number of heads, of 32 features each."""


def forms(scale: Scale) -> list[Settings]:
    """The main forms, each fusion, all other forms with four heads, and some with more heads."""
    fused = [form + fusion for form in FUSED for fusion in FUSIONS if form + fusion not in MAIN]
    single = [form for form in single_layers(80, 4, 2048) if form not in (*MAIN, *FUSED, "coordinated 12")]
    cells = [cell(scale, variant) for variant in (*MAIN, *fused, *single)]
    for heads, variants in OF_HEADS.items():
        cells += [cell(scale, variant, heads=heads, hidden=32 * heads) for variant in variants]
    return cells


def hybrids(scale: Scale) -> list[Settings]:
    """Twelve layers of eight heads: one in 6, 12 or 4 sees everything; beside none of them, and all."""
    rests = (BASELINE, "coordinated 4", "dilated heads")
    every, layers = ((6,), 6) if scale == "smoke" else ((6, 12, 4), 12)
    mixed = [f"{rest} + {whole}, 1 in {n}" for n in every for whole in WHOLE for rest in rests]
    variants = (*MAIN, *mixed, "dilated heads")
    return [cell(scale, variant, heads=8, layers=layers) for variant in variants]


LENGTHS = (2048, 4096, 8192, 16384)
CORNERS = ((8192, 320), (8192, 80), (2048, 320), (16384, 640), (16384, 80))
"""Lengths and keys that say most, beside the first of each, which are among the forms."""


def law(scale: Scale) -> list[Settings]:
    """Lengths and keys; and at the first of them, fewer and more steps. Longer contexts begin with the shorter ones."""
    grid = [(length, keys) for length in LENGTHS for keys in (80, 160, 320, 640) if (length, keys) not in CORNERS]
    cells: list[Settings] = []
    for length, keys in CORNERS[:2] if scale == "smoke" else (*CORNERS, *grid):
        more = {"shorter first": list(LENGTHS[: LENGTHS.index(length)])} if length > LENGTHS[0] else {}
        cells += [cell(scale, variant, length, keys, **more) for variant in MAIN[:2]]
        cells.append(cell(scale, "dense", length, **more))  # which has no number of keys
    cells = [cell for cell in cells if cell not in forms(scale)]
    cells += [cell(scale, variant, steps=steps) for steps in (2000, 8000, 1000) for variant in MAIN]
    return [cell for number, cell in enumerate(cells) if cell not in cells[:number]]


SMALLEST: Settings = {"steps": 5500}  # 180 M tokens for 9 M parameters
MIDDLE: Settings = {"hidden": 512, "layers": 8, "heads": 8, "tokens": 65536}  # 34 M parameters
LARGE: Settings = {"hidden": 768, "layers": 16, "heads": 12, "tokens": 65536, "steps": 3600}  # 236 M for 126 M
BY_SIZE = (*MAIN, "coordinated 4 + dense, 1 in 4", f"{BASELINE} + dense, 1 in 4", f"{BASELINE} + coordinated 4, 1 in 4")


def of_size(scale: Scale, size: Settings) -> list[Settings]:
    """The main forms and hybrids on the largest corpus."""
    corpus = "shakespeare" if scale == "smoke" else "kernel+packages+drivers"
    return [cell(scale, variant, **size) | {"corpus": corpus} for variant in BY_SIZE]


def middle(scale: Scale) -> list[Settings]:
    """First the main forms on the corpus of the other experiments, with as many tokens; then 682 M of the largest."""
    few = [cell(scale, variant, **MIDDLE | {"steps": 2000}) for variant in MAIN] if scale == "small" else []
    return few + of_size(scale, MIDDLE | {"steps": 10400})


def equal_time(scale: Scale) -> list[Settings]:
    """As many seconds of training for each, with 9 M parameters, then in longer contexts."""
    variants = (*MAIN, f"{BASELINE} + dense, 1 in 6", "coordinated 4 + dense, 1 in 6", "single period, gate")
    sizes: tuple[Settings, ...] = (
        {"seconds": 45},
        {"seconds": 90, "context": 8192, "keys": 320, "shorter first": [2048]},
    )
    cells = [cell(scale, variant, **size) for size in sizes for variant in variants]
    return [{name: value for name, value in settings.items() if name != "steps"} for settings in cells]


def _experiment(name: str, title: str, cells: Any, rate: float = 3e-3) -> Experiment:
    small = ("smoke", "small")
    return replace(
        EXPERIMENT, name=name, title=title, cells=lambda scale: cells(scale) if scale in small else [], rates=(rate,)
    )


EXPERIMENTS = (
    _experiment("forms", "Forms of the pattern", forms),
    _experiment("hybrids", "Hybrids: one layer in n sees everything", hybrids),
    _experiment("law", "Gain by context, keys and tokens of training", law),
    _experiment("equal_time", "Equal time of training", equal_time),
    _experiment("sizes_9m", "9 M parameters, three corpora", lambda scale: of_size(scale, SMALLEST)),
    _experiment("sizes_34m", "34 M parameters", middle, 2e-3),
    _experiment("sizes_126m", "126 M parameters", lambda scale: of_size(scale, LARGE), 1e-3),
)
