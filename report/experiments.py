"""Tables of the experiments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import fmean

from experiments.experiment import Result
from experiments.registry import EXPERIMENTS
from experiments.rows import load
from report import language_models, law, pretrained, serving, slices
from report.cells import Column, compared, mean_of, measured_cells, shown
from report.keys import planned
from report.markdown import NOTHING, table


def retrieval_qa() -> str:
    """F1, exact match, and the differences from dense attention and the window on the same questions."""

    def by_question(results: list[Result]) -> list[float]:
        scores = zip(*(r["F1 by question"] for r in results), strict=True)
        return [100 * fmean(of_question) for of_question in scores]

    def minus(variant: str) -> Column:
        rows = [row for row in load("retrieval_qa") if row["settings"]["variant"] == variant]
        others = by_question([row["result"] for row in rows]) if rows else []

        def gap(results: list[Result]) -> str:
            gaps = [score - other for score, other in zip(by_question(results), others, strict=True)]
            return shown(gaps, 1) if any(gaps) else "–"

        return gap

    columns = {
        "minus dense, over the questions": minus("dense"),
        "minus window + sinks, over the questions": minus("window + sinks"),
        "exact match": mean_of("exact match", 1),
    }
    return compared("retrieval_qa", columns, digits=1, by=("variant", "sinks"))


def _ways(results: list[Result]) -> str:
    return "; ".join(
        " / ".join(f"{sum(r['recall'][way][k] for r in results) / len(results):.3f}" for k in ("R@1", "R@5", "R@10"))
        for way in ("to text", "to image")
    )


def _by_depth(results: list[Result]) -> str:
    """The mean over seeds at each depth of the longest text."""
    longest = [r["by length and depth"][max(r["by length and depth"], key=int)] for r in results]
    return ", ".join(f"{fmean(of_seed[depth] for of_seed in longest):.2f}" for depth in longest[0])


def cost() -> str:
    """Seconds, tokens a second and memory of real training steps of the large model."""
    lines, row = [], None
    for cell, rows in measured_cells(EXPERIMENTS["cost"]):
        row, result = rows[0], rows[0]["result"]
        counted = result["forward + backward TFLOP of a step, without recomputation"]
        lines.append(
            [
                f"{cell['context']:,}",
                cell["variant"],
                f"{result['parameters'] / 1e9:.2f} B",
                f"{counted:,.0f}",
                f"{result['test']:.2f}",
                f"{result['tokens/s']:,.0f}",
                f"{result['peak GiB']:.1f}",
                f"{row['device']}, {row['date']}",
            ]
        )
    if row is None:
        return NOTHING
    head = ["context", "attention", "parameters", "TFLOP counted", "seconds a step", "tokens/s", "peak GiB", "measured"]
    return f"torch {row['torch']}.\n\n" + table(head, lines)


OF_FORMS = ("forms", "hybrids", "equal_time", "sizes_9m", "sizes_34m", "sizes_126m")
"""Experiments with language models by form, beside the law."""
TABLES: dict[str, Callable[[], str]] = {
    "language_modelling": lambda: language_models.perplexities("language_modelling"),
    "gates": language_models.gates,
    "language_modelling_long": lambda: language_models.perplexities("language_modelling_long"),
    "language_modelling_long_more": lambda: language_models.more("language_modelling_long"),
    "language_modelling_large": lambda: language_models.perplexities("language_modelling_large"),
    "fusions": language_models.fusions,
    "planned": planned,
    **{name: partial(language_models.perplexities, name) for name in OF_FORMS},
    **{f"{name}_slices": partial(slices.of_experiment, name) for name in OF_FORMS},
    "law": lambda: law.law(law.measured()),
    "period_sweep": lambda: compared(
        "period_sweep", {"context seen": mean_of("coverage", 2)}, by=("window", "period", "skips")
    ),
    "recall": lambda: compared(
        "recall",
        {
            "lags in the window": mean_of("near", 2),
            "far, multiples of π": mean_of("aligned", 2),
            "far, others": mean_of("beside", 2),
            "context seen": mean_of("coverage", 2),
        },
    ),
    "questions": lambda: compared("questions", {"by depth, from the beginning to the end": _by_depth}, digits=2),
    "listops": lambda: compared("listops"),
    "lra": lambda: compared("lra"),
    "lra_pooled": lambda: compared("lra_pooled"),
    "retrieval_qa": retrieval_qa,
    "pretrained": pretrained.trained_on,
    "image_text": lambda: compared("image_text", {"R@1 / 5 / 10 to text; to image": _ways}),
    "series": lambda: compared("series"),
    "cost": cost,
    "serving_cost": serving.serving_cost,
}
