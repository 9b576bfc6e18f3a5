"""The period at a fixed budget of keys, its split between window and skips, and what coverage predicts."""

from __future__ import annotations

from pathlib import Path

from experiments import language_modelling
from experiments.experiment import Experiment, Result, Scale, Settings
from experiments.variants import config
from pi_attention.receptive_field import receptive_field

CONTEXT: dict[Scale, int] = {"smoke": 256, "laptop": 1024, "small": 2048}


def measure(settings: Settings, data: Path) -> Result:
    """As language modelling, with the share of the context that the layers together can see."""
    field = receptive_field(config(settings).patterns(), settings["context"])
    return language_modelling.measure(settings, data) | {"coverage": field.covered() / settings["context"]}


def cells(scale: Scale) -> list[Settings]:
    """Periods at window 64 and 16 skips (of which fewer exist beyond 127), then windows and skips of 80 keys."""
    shapes = [(64, period, 16) for period in (4, 16, 64, 127, 512, 1024)]
    shapes += [(72, 64, 8), (48, 48, 32), (16, 32, 64)]
    if scale == "smoke":
        shapes = [(16, 16, 4)]
    common = {"variant": "pi", "context": CONTEXT[scale], **language_modelling.SIZES[scale]}
    return [{**common, "window": w, "period": period, "skips": m} for w, period, m in shapes]


EXPERIMENT = Experiment(
    name="period_sweep",
    title="Period sweep",
    metric="test perplexity a token",
    better="lower",
    cells=cells,
    measure=measure,
    rates=(3e-3,),
    prepare=language_modelling.prepare,
)
