"""The pieces of the measurement, what the command line says of them, and their searches on a machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.multigpu import searches
from benchmarks.multigpu.rows import FILE, Machine, Rows
from benchmarks.multigpu.workers import Search

PIECES = ("operator", "throughput", "layouts", "contexts", "runs", "killed", "patterns", "largest", "stopped")


def power_of_two(text: str) -> int:
    """A number of GPUs."""
    if not text.isdigit() or not int(text) or int(text) & (int(text) - 1):
        raise argparse.ArgumentTypeError(f"{text!r} is no power of two: take 1, 2, 4, 8 …")
    return int(text)


def options(described: str | None = None, arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line says, `sys.argv` when None; its help begins as described."""
    parser = argparse.ArgumentParser(description=described, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=PIECES, help="in this order")
    parser.add_argument("--gpus", type=power_of_two, nargs="+", help="numbers of GPUs to compare; all powers of two")
    parser.add_argument("--lengths", type=int, nargs="+", help="of the operator; by the number of GPUs")
    parser.add_argument("--model", choices=["1b", "8b"], default="1b", help="of training steps")
    parser.add_argument("--ways", nargs="+", choices=searches.WAYS, default=searches.WAYS, help="of training steps")
    parser.add_argument("--dense-seconds", type=float, default=5.0, help="longest call of dense attention")
    parser.add_argument("--context", type=int, default=1 << 15, help="tokens of a sequence in training steps")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which what runs is ended")
    parser.add_argument("--out", type=Path, default=FILE, help="file that rows are added to")
    parser.add_argument("--before", type=Path, nargs="*", default=[FILE], help="files of earlier calls")
    parser.add_argument("--start", choices=["forkserver", "spawn"], default="forkserver", help="how processes start")
    parser.add_argument("--dry", action="store_true", help="toy sizes on gloo and CPUs; nothing is compared")
    return parser.parse_args(arguments)


def machine_of(given: argparse.Namespace) -> Machine:
    """The GPUs of this host; dry, as many processes as the most that are compared, or four."""
    return Machine("CPU", max(given.gpus or [4]), 1 << 20) if given.dry else Machine.found()


def planned(given: argparse.Namespace, rows: Rows) -> list[Search]:
    """The searches of the pieces, in their order; of each piece the most GPUs first, should the time be up.

    Raises:
        SystemExit: the machine has fewer GPUs than any of the numbers that are compared.
    """
    dry, machine = given.dry, rows.machine
    asked = given.gpus or [1 << power for power in range(machine.gpus.bit_length())]
    counts = sorted({ranks for ranks in asked if ranks <= machine.gpus}, reverse=True)
    if not counts:
        raise SystemExit(f"--gpus {' '.join(map(str, asked))}: this machine has {machine.gpus}.")
    context, model = (512, "toy") if dry else (given.context, given.model)
    least, longest, most = *((512, 1024) if dry else (1 << 15, 1 << 22)), max(counts)

    def lengths(ranks: int) -> list[int]:
        return [4096, 8192] if dry else given.lengths or searches.lengths_on(ranks)

    made = {
        "operator": lambda: searches.operators(rows, counts, lengths, given.dense_seconds),
        "contexts": lambda: searches.contexts(machine, counts, model, given.ways, least, longest),
        "layouts": lambda: searches.layouts(counts, context, model),
        "throughput": lambda: searches.throughput(counts, model, context, given.ways),
        "largest": lambda: [searches.largest(machine, most, context, *(("toy", 8, 4) if dry else ("8b", 512, 8)))],
        "patterns": lambda: searches.patterns(counts, context, model),
        "runs": lambda: searches.runs(most, dry),
        "killed": lambda: searches.killed(most, "SIGKILL", dry),
        "stopped": lambda: searches.killed(most, "SIGSTOP", dry),
    }
    return [search for piece in given.pieces for search in made[piece]()]
