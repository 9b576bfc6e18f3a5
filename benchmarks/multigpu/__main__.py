"""Context parallelism on several GPUs of one host: the operator, training steps, contexts that fit, whole runs.

    python -m benchmarks.multigpu                        # every piece, on all GPUs; no torchrun
    python -m benchmarks.multigpu --pieces operator contexts --minutes 9
    python -m benchmarks.multigpu --dry                  # toy sizes, four processes, on gloo and CPUs

Cases run on the GPUs that are free, each in processes of its own. Rows are added to results/multigpu.jsonl as they
come; what it holds for this GPU is not measured again, so a killed call is repeated with the same command.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}  # NVLink multicast stays off
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # imports that ask for a GPU make no context to fork
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

from benchmarks.multigpu import searches
from benchmarks.multigpu.launch import Launcher
from benchmarks.multigpu.rows import FILE, Machine, Rows
from benchmarks.multigpu.workers import Case, Search

PIECES = ("operator", "throughput", "layouts", "contexts", "runs", "killed", "patterns", "largest", "stopped")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=PIECES, help="in this order")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4], help="numbers of GPUs to compare")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1 << n for n in range(15, 21)], help="of the operator"
    )
    parser.add_argument("--ways", nargs="+", choices=searches.WAYS, default=searches.WAYS, help="of training steps")
    parser.add_argument("--dense-seconds", type=float, default=5.0, help="longest call of dense attention")
    parser.add_argument("--context", type=int, default=1 << 15, help="tokens of a sequence in training steps")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which what runs is ended")
    parser.add_argument("--out", type=Path, default=FILE, help="file that rows are added to")
    parser.add_argument("--before", type=Path, nargs="*", default=[FILE], help="files of earlier calls")
    parser.add_argument("--start", choices=["forkserver", "spawn"], default="forkserver", help="how processes start")
    parser.add_argument("--dry", action="store_true", help="toy sizes on gloo and CPUs; nothing is compared")
    return parser.parse_args()


def planned(given: argparse.Namespace, rows: Rows) -> list[Search]:
    """The searches of the pieces, in their order."""
    dry, machine = given.dry, rows.machine
    counts = [ranks for ranks in given.gpus if ranks <= machine.gpus]
    lengths = [4096, 8192] if dry else given.lengths
    context, model = (512, "toy") if dry else (given.context, "1b")
    least, most = (512, 1024) if dry else (1 << 15, 1 << 22)
    run = {"steps": 4 if dry else 40, "toy": dry, "tolerance": 1e-4 if dry else 0.03}
    kill = {"toy": dry, "patience": 5 if dry else 15}
    made = {
        "operator": lambda: searches.operators(rows, counts, lengths, given.dense_seconds),
        "contexts": lambda: searches.contexts(machine, counts, model, given.ways, least, most),
        "layouts": lambda: searches.layouts(counts, context, model),
        "throughput": lambda: searches.throughput(counts, model, [context, 4 * context], given.ways),
        "largest": lambda: [searches.largest(machine, max(counts), context, *(("toy", 8) if dry else ("8b", 512)))],
        "patterns": lambda: searches.patterns(counts, context, model),
        "runs": lambda: [searches.one(Case("run", 4, (run,), limit=240))],
        "killed": lambda: [searches.one(Case("killed", 4, (kill | {"signal": "SIGKILL"},)))],
        "stopped": lambda: [searches.one(Case("killed", 4, (kill | {"signal": "SIGSTOP"},)))],
    }
    return [search for piece in given.pieces for search in made[piece]()]


def main() -> None:
    given = options()
    machine = Machine("CPU", 4, 1 << 20) if given.dry else Machine.found()
    if given.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rows = Rows(given.out, given.before, machine)
    Launcher(rows, given.dry, given.minutes, given.start).run(planned(given, rows))
    print(given.out)


if __name__ == "__main__":
    main()
