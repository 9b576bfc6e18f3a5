"""Tables of the experiments."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from experiments.registry import EXPERIMENTS
from experiments.rows import load
from experiments.runner import Result
from report.cells import compared, mean_of, measured_cells, shown
from report.markdown import NOTHING, table


def _gate(results: list[Result]) -> str:
    gates = [r["gate"]["by head"] for r in results if "gate" in r]
    if not gates:
        return "–"
    layers = zip(*[[sum(heads) / len(heads) for heads in gate] for gate in gates], strict=True)
    return ", ".join(f"{sum(values) / len(values):.2f}" for values in layers)


def _last_bucket(results: list[Result]) -> str:
    known = [r["by position"][-1] for r in results if "by position" in r]
    return shown(known, 3) if known else "–"


def language_modelling(name: str) -> str:
    """Perplexities, at the end of the context and on other text too, and the gates."""
    columns = {
        "last eighth of the context": _last_bucket,
        "WikiText-103 test, word perplexity": mean_of("wikitext-103 word perplexity", 0),
        "mean gate by layer": _gate,
    }
    return compared(name, columns)


def gates() -> str:
    """What the gates of the language models learned."""
    lines = []
    for cell, rows in measured_cells(EXPERIMENTS["language_modelling"]):
        found = [row["result"]["gate"] for row in rows if "gate" in row["result"]]
        if not found or cell["variant"] == "pi, fixed half":
            continue
        heads = [head for gate in found for layer in gate["by head"] for head in layer]
        ends = [fmean(gate["by position"][place] for gate in found) for place in (0, -1)]
        classes = [gate["by token class"] for gate in found if "by token class" in gate]
        names = sorted({name for means in classes for name in means})
        of_class = {name: fmean(means[name] for means in classes if name in means) for name in names}
        lines.append(
            [
                f"{cell['corpus']}, {cell['context']:,}, {cell['variant']}",
                str(len(found)),
                f"{min(heads):.2f} to {max(heads):.2f}",
                f"{fmean(gate['spread'] for gate in found):.3f}",
                f"{ends[0]:.3f}, {ends[1]:.3f}",
                ", ".join(f"{name} {mean:.3f}" for name, mean in of_class.items()) or "–",
            ]
        )
    head = [
        "corpus, context, variant",
        "seeds",
        "means of heads",
        "spread over tokens",
        "first and last eighth",
        "by class of the token",
    ]
    return table(head, lines) if lines else NOTHING


def retrieval_qa() -> str:
    """F1, exact match, and the difference from dense attention on the same questions."""

    def by_question(results: list[Result]) -> list[float]:
        scores = zip(*(r["F1 by question"] for r in results), strict=True)
        return [100 * fmean(of_question) for of_question in scores]

    rows = [row for row in load("retrieval_qa") if row["settings"]["variant"] == "dense"]
    dense = by_question([row["result"] for row in rows]) if rows else []

    def gap(results: list[Result]) -> str:
        gaps = [score - other for score, other in zip(by_question(results), dense, strict=True)]
        return shown(gaps, 1) if any(gaps) else "–"

    columns = {"minus dense, over the questions": gap, "exact match": mean_of("exact match", 1)}
    return compared("retrieval_qa", columns, digits=1, by=("variant", "sinks"))


def _ways(results: list[Result]) -> str:
    return "; ".join(
        " / ".join(f"{sum(r['recall'][way][k] for r in results) / len(results):.3f}" for k in ("R@1", "R@5", "R@10"))
        for way in ("to text", "to image")
    )


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


TABLES: dict[str, Callable[[], str]] = {
    "language_modelling": lambda: language_modelling("language_modelling"),
    "gates": gates,
    "language_modelling_long": lambda: language_modelling("language_modelling_long"),
    "language_modelling_large": lambda: language_modelling("language_modelling_large"),
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
    "listops": lambda: compared("listops"),
    "lra": lambda: compared("lra"),
    "retrieval_qa": retrieval_qa,
    "image_text": lambda: compared("image_text", {"R@1 / 5 / 10 to text; to image": _ways}),
    "series": lambda: compared("series"),
    "cost": cost,
}
