"""The rows of an experiment as cells, and a table that compares its variants."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any

from benchmarks.intervals import interval
from experiments.experiment import Experiment, Result, Settings, best_rate, without
from experiments.registry import EXPERIMENTS
from experiments.rows import Row, load
from experiments.variants import BASELINE
from report.keys import mean_keys
from report.markdown import NOTHING, table

Cell = tuple[Settings, list[Row]]
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


def measured_on(rows: list[Row]) -> str:
    """Device, version and days of rows."""
    days: dict[str, set[str]] = {}
    for row in rows:
        days.setdefault(f"{row['device']}, torch {row['torch']}", set()).add(row["date"])
    return "; ".join(f"{device}, {', '.join(sorted(dates))}" for device, dates in sorted(days.items()))


def grouped(name: str, by: tuple[str, ...] = ("variant",)) -> list[tuple[Settings, list[Cell]]]:
    """The cells of an experiment, those together that differ in `by` alone; and what they have in common."""
    groups: list[tuple[Settings, list[Cell]]] = []
    for cell, rows in measured_cells(EXPERIMENTS[name]):
        common = without(cell, *by, "lags")
        group = next((members for settings, members in groups if settings == common), None)
        if group is None:
            group = []
            groups.append((common, group))
        group.append((cell, rows))
    return groups


def heading(common: Settings, members: list[Cell]) -> str:
    """What stands above the table of a group."""
    said = ", ".join(f"{key} {value}" for key, value in common.items())
    return f"{said}. {measured_on([row for _, rows in members for row in rows])}."


def of_seeds(rows: list[Row], read: Callable[[Result], Any] = itemgetter("test")) -> dict[int, Any]:
    """What is read of each result, by seed: the metric on the test part unless told."""
    return {row["settings"]["seed"]: read(row["result"]) for row in rows}


def by_seed(members: list[Cell], variant: str, part: str = "test") -> dict[int, float]:
    """The metric of a variant of a group; empty if it has no row."""
    return of_seeds(next((rows for cell, rows in members if cell.get("variant") == variant), []), itemgetter(part))


def paired(ours: dict[int, Any], others: dict[int, Any]) -> list[tuple[Any, Any]]:
    """What two have for each seed of both."""
    return [(ours[seed], others[seed]) for seed in sorted(ours) if seed in others]


def percent_above(ours: dict[int, float], others: dict[int, float]) -> list[float]:
    """By how many percent metrics are above others, for each seed of both."""
    return [100 * (value / other - 1) for value, other in paired(ours, others)]


def compared(
    name: str,
    columns: dict[str, Column] | None = None,
    digits: int = 3,
    by: tuple[str, ...] = ("variant",),
    baseline: str = BASELINE,
) -> str:
    """A table for each group of cells that differ in `by` alone: the metric, and its difference from the baseline."""
    experiment, columns = EXPERIMENTS[name], columns or {}
    parts = []
    for common, members in grouped(name, by):
        base = by_seed(members, baseline)
        lines = []
        for cell, rows in members:
            results = [row["result"] for row in rows]
            gaps = [value - other for value, other in paired(of_seeds(rows), base)]
            line = [*(str(cell.get(name, "–")) for name in by), f"{mean_keys(name, cell):,.1f}"]
            line.append(shown([r["test"] for r in results], digits))
            if base:
                line.append("–" if cell["variant"] == baseline or not gaps else shown(gaps, digits))
            line.append(str(len(rows)))
            line += [column(results) for column in columns.values()]
            lines.append([*line, f"{rows[0]['settings']['rate']:g}"])
        gap = [f"minus {baseline}"] if base else []
        head = [*by, "keys a query", experiment.metric, *gap, "seeds", *columns, "learning rate"]
        parts.append(heading(common, members) + "\n\n" + table(head, lines))
    return "\n\n".join(parts) or NOTHING


def mean_of(key: str, digits: int) -> Column:
    """A column of the mean of one value of the results."""
    return lambda results: shown([r[key] for r in results], digits) if all(key in r for r in results) else "–"
