"""All experiments by name."""

from __future__ import annotations

from experiments import (
    cost,
    image_text,
    language_modelling,
    listops,
    period_sweep,
    recall,
    retrieval_qa,
    series,
)
from experiments.runner import Experiment

MODULES = (language_modelling, period_sweep, recall, listops, retrieval_qa, image_text, series, cost)
EXPERIMENTS: dict[str, Experiment] = {module.EXPERIMENT.name: module.EXPERIMENT for module in MODULES}
