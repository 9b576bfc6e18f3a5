"""All experiments by name."""

from __future__ import annotations

from experiments import (
    cost,
    image_text,
    language_forms,
    language_modelling,
    listops,
    lra,
    period_sweep,
    pretrained,
    questions,
    recall,
    retrieval_qa,
    series,
    serving_cost,
)
from experiments.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        language_modelling.EXPERIMENT,
        language_modelling.LONG_EXPERIMENT,
        language_modelling.LARGE_EXPERIMENT,
        *language_forms.EXPERIMENTS,
        period_sweep.EXPERIMENT,
        recall.EXPERIMENT,
        questions.EXPERIMENT,
        listops.EXPERIMENT,
        lra.EXPERIMENT,
        lra.POOLED_EXPERIMENT,
        retrieval_qa.EXPERIMENT,
        pretrained.EXPERIMENT,
        image_text.EXPERIMENT,
        series.EXPERIMENT,
        cost.EXPERIMENT,
        serving_cost.EXPERIMENT,
    )
}
