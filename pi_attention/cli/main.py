"""`pi-attention COMMAND`: parse, run, and turn errors of the user into one clear line."""

from __future__ import annotations

import dataclasses
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import tyro

from pi_attention.cli.bill import Bill
from pi_attention.cli.convert import Convert
from pi_attention.cli.env import Env
from pi_attention.cli.evaluate import Eval
from pi_attention.cli.generate import Generate
from pi_attention.cli.inspect import Inspect
from pi_attention.cli.limits import check_limits
from pi_attention.cli.options import (
    REGISTRY,
    check_options,
    nearest,
    parser_errors_in_one_line,
    short_usage,
    take_config,
)
from pi_attention.cli.plan import Plan
from pi_attention.cli.serve import Serve
from pi_attention.cli.terminal import (
    INTERRUPTED,
    TRACEBACK,
    close_quietly,
    in_words,
    is_full_disk,
    make_console,
    prepare_streams,
    print_line,
    warnings_in_one_line,
)
from pi_attention.cli.train import Train, need_settings_of_run
from pi_attention.paths import refused
from pi_attention.training.config import load_yaml

COMMANDS: dict[str, Any] = {
    "train": Train,
    "eval": Eval,
    "generate": Generate,
    "serve": Serve,
    "inspect": Inspect,
    "plan": Plan,
    "bill": Bill,
    "convert": Convert,
    "env": Env,
}
WRONG, UNEXPECTED = 2, 1
"""Exit codes: what the user gave is wrong, the library is."""


def parse(arguments: list[str]) -> Any:
    """The command's settings, from defaults, then the YAML file, then the flags.

    Raises:
        ValueError, FileNotFoundError: a command, an option or a value is wrong; the message names it and the remedy.
        SystemExit: help was asked for, and printed.
    """
    arguments, config = take_config(arguments)
    short_names = (tyro.conf.OmitArgPrefixes,)
    if not arguments or arguments[0] not in COMMANDS:
        if config is not None:
            raise ValueError(f"--config needs a command before it: one of {sorted(COMMANDS)}.")
        if not arguments:
            raise ValueError(f"a command is missing: use one of {', '.join(COMMANDS)}.")
        if arguments[0] not in ("-h", "--help") and not arguments[0].startswith("--tyro"):
            raise ValueError(
                f"{arguments[0]!r} is no command{nearest(arguments[0], COMMANDS)} Use one of {', '.join(COMMANDS)}."
            )
        for_people = arguments[0] in ("-h", "--help")
        with short_usage(COMMANDS) if for_people else nullcontext():
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                args=arguments,
                prog="pi-attention",
                description="Train, evaluate, serve and look into transformers with π-Attention.\n\n"
                "Each command also takes --config FILE.yaml. Flags win over the file.\n\n"
                "pi-attention --version prints the version.",
                config=short_names,
                registry=REGISTRY,
            )
    name, *rest = arguments
    kind = COMMANDS[name]
    check_options(name, kind, rest)

    def over(default: Any) -> Any:
        if config is not None:
            default = load_yaml(kind, config, default)
        return tyro.cli(
            kind, args=rest, default=default, prog=f"pi-attention {name}", config=short_names, registry=REGISTRY
        )

    if {"-h", "--help"} & set(rest):  # prints, and leaves
        return over(kind())
    with parser_errors_in_one_line(name):
        command = over(kind())
    check_limits(name, command)
    if isinstance(command, Train):
        need_settings_of_run(command, over)
    return command


def named(settings: Any, error: OSError) -> OSError | ValueError:
    """The system's error as one of the argument whose path it concerns, where there is one."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            found = named(value, error)
            if found is not error:
                return found
        elif isinstance(value, Path | str) and str(value) not in ("", "."):
            path = Path(str(error.filename))
            if Path(value) in (path, *path.parents):
                return refused(field.name, value, error)
    return error


def run(command: Any) -> int:
    """Execute a command; the exit code.

    Raises:
        ValueError: the system refuses a path; the message names the argument.
    """
    try:
        code: int = command.execute(make_console())
    except OSError as error:
        if error.filename is None:
            raise
        raise named(command, error) from error
    sys.stdout.flush()
    return code


def main() -> None:
    """Entry point of the `pi-attention` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    prepare_streams()
    try:
        with warnings_in_one_line():
            code = run(parse(sys.argv[1:]))
    except BrokenPipeError:  # `| head` has read enough
        close_quietly()
        code = UNEXPECTED
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        wrong = isinstance(error, ValueError | TypeError | OSError | NotImplementedError | MemoryError)
        wrong = wrong or is_full_disk(error)
        where = "" if wrong else f" ({type(error).__name__}; with {TRACEBACK}=1 it says where)"
        print_line("error", in_words(error) + where)
        raise SystemExit(WRONG if wrong else UNEXPECTED) from error
    raise SystemExit(code)
