"""Tables of docs/results.md from the result files; `python -m benchmarks.report` writes them into the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

from experiments.intervals import interval
from experiments.registry import EXPERIMENTS
from experiments.runner import Experiment, Result, Settings, best_rate, load, without
from experiments.variants import BASELINE

Cell = tuple[Settings, list[dict[str, Any]]]
Column = Callable[[list[Result]], str]


def shown(values: list[float], digits: int) -> str:
    """Mean ± half-width of the 95 % interval, over seeds."""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def measured_cells(experiment: Experiment) -> list[Cell]:
    """Settings without rate and seed, and the rows of all seeds at the best rate, in the order of the experiment."""
    rows = load(experiment.name)
    cells: list[Settings] = []
    for row in rows:
        cell = without(row["settings"], "rate", "seed")
        if cell not in cells and row["settings"]["seed"] == 0:
            cells.append(cell)
    order = experiment.cells("small")
    cells.sort(key=lambda cell: order.index(cell) if cell in order else len(order))
    found = []
    for cell in cells:
        rate = best_rate(experiment, cell, rows)
        of_cell = [
            row for row in rows if without(row["settings"], "rate", "seed") == cell and row["settings"]["rate"] == rate
        ]
        found.append((cell, sorted(of_cell, key=lambda row: row["settings"]["seed"])))
    return found


def measured_on(rows: list[dict[str, Any]]) -> str:
    """Device, version and days of rows."""
    days: dict[str, set[str]] = {}
    for row in rows:
        days.setdefault(f"{row['device']}, torch {row['torch']}", set()).add(row["date"])
    return "; ".join(f"{device}, {', '.join(sorted(dates))}" for device, dates in sorted(days.items()))


def compared(
    name: str, columns: dict[str, Column] | None = None, digits: int = 3, by: tuple[str, ...] = ("variant",)
) -> str:
    """A table for each group of cells that differ in `by` alone: the metric, and its difference from the baseline."""
    from benchmarks.report import table

    experiment, columns = EXPERIMENTS[name], columns or {}
    cells = measured_cells(experiment)
    if not cells:
        return "Not measured yet."
    groups: list[tuple[Settings, list[Cell]]] = []
    for cell, rows in cells:
        common = without(cell, *by, "lags")
        group = next((members for settings, members in groups if settings == common), None)
        if group is None:
            group = []
            groups.append((common, group))
        group.append((cell, rows))
    parts = []
    for common, members in groups:
        baseline = next((rows for cell, rows in members if cell.get("variant") == BASELINE), [])
        base = {row["settings"]["seed"]: row["result"]["test"] for row in baseline}
        lines = []
        for cell, rows in members:
            results = [row["result"] for row in rows]
            gaps = [r["result"]["test"] - base[r["settings"]["seed"]] for r in rows if r["settings"]["seed"] in base]
            line = [*(str(cell.get(name, "–")) for name in by), shown([r["test"] for r in results], digits)]
            if base:
                line.append("–" if cell["variant"] == BASELINE or not gaps else shown(gaps, digits))
            line.append(str(len(rows)))
            line += [column(results) for column in columns.values()]
            lines.append([*line, f"{rows[0]['settings']['rate']:g}"])
        said = ", ".join(f"{key} {value}" for key, value in common.items())
        gap = [f"minus {BASELINE}"] if base else []
        head = [*by, experiment.metric, *gap, "seeds", *columns, "learning rate"]
        parts.append(f"{said}. {measured_on([row for _, rows in members for row in rows])}.\n\n" + table(head, lines))
    return "\n\n".join(parts)


def mean_of(key: str, digits: int) -> Column:
    """A column of the mean of one value of the results."""
    return lambda results: shown([r[key] for r in results], digits) if all(key in r for r in results) else "–"


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
    from benchmarks.report import table

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
    return table(head, lines) if lines else "Not measured yet."


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
    from benchmarks.report import table

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
        return "Not measured yet."
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
