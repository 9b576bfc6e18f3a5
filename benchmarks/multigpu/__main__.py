"""Context parallelism on several GPUs of one host: the operator, training steps, contexts that fit, whole runs.

    python -m benchmarks.multigpu                        # every piece, on all GPUs; no torchrun
    python -m benchmarks.multigpu --pieces operator contexts --minutes 9
    python -m benchmarks.multigpu --dry --gpus 1 2 4 8   # toy sizes, up to eight processes, on gloo and CPUs

Cases run on the GPUs that are free, each in processes of its own. Rows are added to results/multigpu.jsonl as they
come; what it holds for this GPU is not measured again, so a killed call is repeated with the same command.
"""

from __future__ import annotations

import os

os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}  # NVLink multicast stays off
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # imports that ask for a GPU make no context to fork
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

from benchmarks.multigpu.launch import Launcher
from benchmarks.multigpu.pieces import machine_of, options, planned
from benchmarks.multigpu.rows import Rows


def main() -> None:
    given = options(__doc__)
    machine = machine_of(given)
    if given.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rows = Rows(given.out, given.before, machine)
    Launcher(rows, given.dry, given.minutes, given.start).run(planned(given, rows))
    print(given.out)


if __name__ == "__main__":
    main()
