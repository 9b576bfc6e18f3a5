"""Which row a free worker measures next: the first in the order of importance that can begin and would end in time."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain, zip_longest

from experiments.experiment import Experiment, Settings, best_rate, without
from experiments.rows import Row

FREE = ("variant", "rate", "seed", "window", "period", "skips", "keys", "sinks", "lags")
"""Settings that rows of the same size may differ in."""
RECENT, MARGIN = 4, 1.1
"""A row is expected to take as long as the longest of this many earlier ones, times the margin."""


def expected(experiment: Experiment, settings: Settings, rows: list[Row]) -> float:
    """Seconds that a row will take: as the latest of its variant and size, or of its size, or as the experiment says.

    0 where nothing is known.
    """
    alike = [row for row in rows if without(row["settings"], *FREE) == without(settings, *FREE)]
    same = [row for row in alike if row["settings"].get("variant") == settings.get("variant")]
    latest = [row["seconds"] for row in (same or alike)[-RECENT:]]
    if latest:
        return MARGIN * max(latest)
    return experiment.seconds(settings) if experiment.seconds is not None else 0.0


@dataclass
class Task:
    """A row to be measured: at every rate of the grid with seed 0, at the best of them (`rate=None`) with others."""

    experiment: Experiment
    cell: Settings
    seed: int
    rate: float | None

    def settings(self, done: list[Row], failed: list[Settings]) -> Settings | None:
        """Those of the row; None as long as the best rate is not known, or if no rate ran."""
        rates = self.experiment.rates if self.rate is None else (self.rate,)
        if len(rates) > 1:
            grid = [{**self.cell, "rate": rate, "seed": 0} for rate in rates]
            ran = [row for row in done if row["settings"] in grid]
            if not ran or len(ran) + sum(settings in failed for settings in grid) < len(grid):
                return None
            rates = (best_rate(self.experiment, self.cell, ran),)
        return {**self.cell, "rate": rates[0], "seed": self.seed}


def tasks(experiment: Experiment, cells: list[Settings], seeds: int) -> list[list[Task]]:
    """The rows of each cell: all of its seeds, before the next cell, since one seed says little."""
    return [
        [Task(experiment, cell, 0, rate) for rate in experiment.rates]
        + [Task(experiment, cell, seed, None) for seed in range(1, seeds)]
        for cell in cells
    ]


def ordered(experiments: list[list[list[Task]]], in_turn: bool) -> list[Task]:
    """The rows of several experiments one after the other, or of a cell of each in turn."""
    cells = chain(*zip_longest(*experiments, fillvalue=[])) if in_turn else chain(*experiments)
    return [task for rows in cells for task in rows]


@dataclass
class Queue:
    """What is still to be measured, the most important first, and the finished rows of each experiment."""

    waiting: list[Task]
    done: dict[str, list[Row]]
    failed: list[tuple[str, Settings]] = field(default_factory=list)

    def take(self, left: float) -> tuple[Experiment, Settings] | None:
        """The first row that can begin now and would end within `left` seconds, taken out; finished rows go too."""
        for task in list(self.waiting):
            name = task.experiment.name
            settings = task.settings(self.done[name], [failed for of, failed in self.failed if of == name])
            if settings is None:
                continue
            if any(row["settings"] == settings for row in self.done[name]):
                self.waiting.remove(task)
            elif expected(task.experiment, settings, self.done[name]) <= left:
                self.waiting.remove(task)
                return task.experiment, settings
        return None
