"""`pi-attention experiment`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table


def _part(name: str) -> Any:
    try:
        return importlib.import_module(f"experiments.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("experiments", f"experiments.{name}"):
            raise
        raise FileNotFoundError(
            "the experiments are in the repository, not in the package: clone it, pip install -e '.[train]', and call "
            "pi-attention in its root."
        ) from error


@dataclass
class Experiment:
    """The paper's experiments: list them, run one, or write their tables into docs/results.md."""

    action: tyro.conf.Positional[Literal["list", "run", "report"]] = "list"
    """What to do."""
    name: tyro.conf.Positional[str] = ""
    """Of the experiment to run; all when left out."""
    scale: Literal["smoke", "laptop", "small"] = "small"
    """"smoke" shows that the code works, in seconds on a CPU; "laptop" takes an hour there; "small" needs a GPU."""
    data: Path = Path("data")
    """Folder of the data sets; docs/results.md says what belongs there."""
    dataset: str | None = None
    """A data set of the hub to train the language models on, with its own splits, such as Salesforce/wikitext."""
    results: Path | None = None
    """Folder of the result files, where a finished row is not measured again; experiments/results by default."""
    workers: int = 1
    """Rows measured at the same time, each in a process; they take the GPUs in turn."""
    seeds: int | None = None
    """Seeds of each variant; as many as the experiment asks for by default."""
    only: str = ""
    """Run only the cells whose settings, as JSON, contain this text."""

    def execute(self, console: Console) -> int:
        """Run the command; 0 when it succeeds."""
        experiments = _part("registry").EXPERIMENTS
        runner = _part("runner")
        folder = self.results or runner.RESULTS
        if self.action == "list":
            table = Table("name", "what", "measured by", "cells", "finished rows")
            table.columns[0].no_wrap = True
            for name, entry in experiments.items():
                finished = str(len(runner.load(name, folder)))
                table.add_row(name, entry.title, entry.metric, str(len(entry.cells(self.scale))), finished)
            console.print(table)
            return 0
        if self.action == "report":
            if self.results is not None:
                raise ValueError("results must be left out with report: the page shows experiments/results.")
            importlib.import_module("benchmarks.report").main()
            return 0
        if self.name and self.name not in experiments:
            raise ValueError(f"name={self.name!r} is no experiment: use one of {sorted(experiments)}.")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}.")
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}.")
        chosen = [experiments[self.name]] if self.name else [e for e in experiments.values() if e.cells(self.scale)]
        if self.dataset is not None:
            if not self.name:
                raise ValueError("dataset needs the name of the experiment to run: language_modelling, for example.")
            chosen = [runner.on_dataset(entry, self.dataset) for entry in chosen]
        for entry in chosen:
            console.print(entry.title, style="bold")
            runner.run(
                entry,
                self.scale,
                self.data,
                folder=folder,
                workers=self.workers,
                seeds=self.seeds,
                only=self.only,
            )
        return 0
