"""The paper's experiments: `python -m experiments list`, `python -m experiments run recall`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from experiments.registry import EXPERIMENTS
from experiments.rows import RESULTS, load
from experiments.runner import Experiment, Scale, on_dataset, run
from pi_attention.cli.terminal import in_words, print_line


@dataclass
class List:
    """List the experiments, and how many of their rows are finished."""

    scale: Scale = "small"
    """The scale whose cells are counted."""
    results: Path = RESULTS
    """Folder of the result files."""

    def execute(self, console: Console) -> None:
        """Print the table."""
        table = Table("name", "what", "measured by", "cells", "finished rows")
        table.columns[0].no_wrap = True
        for name, entry in EXPERIMENTS.items():
            finished = str(len(load(name, self.results)))
            table.add_row(name, entry.title, entry.metric, str(len(entry.cells(self.scale))), finished)
        console.print(table)


@dataclass
class Run:
    """Run experiments; finished rows are skipped, and each new row is written at once."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of the experiments, as `list` prints them; all by default."""
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

    def execute(self, console: Console) -> None:
        """Run what was asked for, one experiment after the other."""
        for entry in self.chosen():
            console.print(entry.title, style="bold")
            run(
                entry,
                self.scale,
                self.data,
                folder=self.results,
                workers=self.workers,
                seeds=self.seeds,
                only=self.only,
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
        if self.dataset is None:
            asked = [EXPERIMENTS[name] for name in self.names]
            return asked or [entry for entry in EXPERIMENTS.values() if entry.cells(self.scale)]
        if not self.names:
            raise ValueError("dataset needs the name of an experiment that trains on text: language_modelling, say.")
        return [on_dataset(EXPERIMENTS[name], self.dataset) for name in self.names]


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
        command.execute(Console(markup=False, emoji=False, highlight=False))
    except (ValueError, OSError) as error:
        print_line("error", in_words(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
