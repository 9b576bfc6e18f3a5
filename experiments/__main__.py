"""The paper's experiments: `python -m experiments list`, `python -m experiments run recall`."""

from __future__ import annotations

import math
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from experiments.experiment import Experiment, Scale, on_dataset, without
from experiments.registry import EXPERIMENTS
from experiments.rows import RESULTS, load
from experiments.runner import RowsFailed, run
from pi_attention.cli.terminal import in_words, make_console, print_line, warnings_in_one_line
from pi_attention.paths import need_folder, status_of


@dataclass
class List:
    """List the experiments, their cells, and how many of these have rows.

    A cell is one variant in one setting, and a row is a cell at one learning rate with one seed.
    """

    scale: Scale = "small"
    """The scale whose cells are counted."""
    results: Path = RESULTS
    """Folder of the result files."""

    def execute(self, console: Console) -> None:
        """Print the table."""
        need_no_file("results", self.results)
        caption = f"cells: variants in their settings, at --scale {self.scale}; rows: of every scale, rate and seed"
        table = Table("name", "what", "measured by", "cells measured", "rows", caption=caption)
        table.columns[0].no_wrap = True
        for name, entry in EXPERIMENTS.items():
            rows, cells = load(name, self.results), entry.cells(self.scale)
            measured = [without(row["settings"], "rate", "seed") for row in rows]
            of_all = f"{sum(cell in measured for cell in cells)} of {len(cells)}"
            table.add_row(name, entry.title, entry.metric, of_all, str(len(rows)))
        console.print(table)


@dataclass
class Run:
    """Run experiments; finished rows are skipped, and each new row is written at once."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of the experiments, as `list` prints them, the most important first; all by default."""
    scale: Scale = "small"
    """"smoke" shows that the code works, in seconds on a CPU. "laptop" takes an hour there. "small" needs a GPU."""
    data: Path = Path("data")
    """Folder of the data sets. docs/experiments.md says what belongs there."""
    dataset: str | None = None
    """A data set of the hub for the language models, with its own splits, such as Salesforce/wikitext."""
    results: Path = RESULTS
    """Folder of the result files."""
    workers: int = 1
    """Rows measured at the same time, each in a process. The processes take the GPUs in turn."""
    seeds: int | None = None
    """Seeds of each variant. By default as many as the experiment asks for."""
    only: str = ""
    """Run only the cells whose settings, as JSON, contain this text."""
    minutes: float = math.inf
    """Begin no row that would end later than this. Earlier rows of the same size say how long one takes."""
    in_turn: bool = False
    """Take a cell of each experiment in turn, instead of all cells of the first one before the second."""

    def execute(self, console: Console) -> None:
        """Run what was asked for, in the order of the names."""
        entries = self.chosen()
        need_no_file("data", self.data)
        need_folder("results", self.results)
        console.print(", ".join(entry.title for entry in entries), style="bold")
        run(
            entries,
            self.scale,
            self.data,
            folder=self.results,
            workers=self.workers,
            seeds=self.seeds,
            only=self.only,
            minutes=self.minutes,
            in_turn=self.in_turn,
        )

    def chosen(self) -> list[Experiment]:
        """The experiments to run.

        Raises:
            ValueError: a name, a number or the data set is wrong.
        """
        for name in self.names:
            if name not in EXPERIMENTS:
                raise ValueError(f"{name!r} is no experiment: use {', '.join(EXPERIMENTS)}.")
        for name, value in (("workers", self.workers), ("seeds", self.seeds)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes} leaves no time: give the minutes until the machine goes back.")
        if self.dataset is None:
            asked = [EXPERIMENTS[name] for name in self.names]
            return asked or [entry for entry in EXPERIMENTS.values() if entry.cells(self.scale)]
        if not self.names:
            raise ValueError("dataset needs the name of an experiment that trains on text: language_modelling, say.")
        return [on_dataset(EXPERIMENTS[name], self.dataset) for name in self.names]


def need_no_file(name: str, path: Path) -> None:
    """Raise ValueError for what is there and no folder; what is not there holds nothing."""
    status = status_of(name, path)
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{name}={str(path)!r} is no folder: name the one that holds the files.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, and print an error of the user in one line."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"list": List, "run": Run},
        args=arguments,
        prog="python -m experiments",
        description="The paper's experiments, run from the root of the repository.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    try:
        with warnings_in_one_line():
            command.execute(make_console())
    except (ValueError, OSError, RowsFailed) as error:
        print_line("error", in_words(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
