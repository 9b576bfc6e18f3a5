"""`pi-attention COMMAND`: parse, run, and turn errors of the user into one clear line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from pi_attention.cli.convert import Convert
from pi_attention.cli.evaluate import Eval
from pi_attention.cli.experiment import Experiment
from pi_attention.cli.generate import Generate
from pi_attention.cli.inspect import Inspect
from pi_attention.cli.plan import Plan
from pi_attention.cli.train import Train
from pi_attention.training.config import load_yaml

COMMANDS: dict[str, Any] = {
    "train": Train,
    "eval": Eval,
    "generate": Generate,
    "inspect": Inspect,
    "plan": Plan,
    "convert": Convert,
    "experiment": Experiment,
}


def _take_config(arguments: list[str]) -> tuple[list[str], Path | None]:
    """Split `--config FILE` off the arguments."""
    for index, argument in enumerate(arguments):
        if argument == "--config":
            if index + 1 == len(arguments):
                raise ValueError("--config needs the path of a YAML file.")
            return arguments[:index] + arguments[index + 2 :], Path(arguments[index + 1])
        if argument.startswith("--config="):
            return arguments[:index] + arguments[index + 1 :], Path(argument.partition("=")[2])
    return arguments, None


def parse(arguments: list[str]) -> Any:
    """The command's settings, from defaults, then the YAML file, then the flags."""
    arguments, config = _take_config(arguments)
    short_names = (tyro.conf.OmitArgPrefixes,)
    if arguments and arguments[0] in COMMANDS and config is not None:
        name, *rest = arguments
        default = load_yaml(COMMANDS[name], config)
        return tyro.cli(COMMANDS[name], args=rest, default=default, prog=f"pi-attention {name}", config=short_names)
    if config is not None:
        raise ValueError(f"--config needs a command before it: one of {sorted(COMMANDS)}.")
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        args=arguments,
        prog="pi-attention",
        description="π-Attention: train, evaluate, generate with and look into long-context transformers. "
        "Each command also takes --config FILE.yaml; flags win over the file.",
        config=short_names,
    )


def main() -> None:
    """Entry point of the `pi-attention` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        command = parse(sys.argv[1:])
        code = command.execute(Console())
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, NotImplementedError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        raise SystemExit(2) from error
    raise SystemExit(code)
