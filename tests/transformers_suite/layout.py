"""Lay out transformers' common test suite as the importable package `hf_suite`, from its source distribution.

    python layout.py TRANSFORMERS.tar.gz TARGET

The distribution lacks some of the modules that the suite imports; their places are taken by the small ones below.
"""

import sys
import tarfile
from pathlib import Path

SUITE = [
    "test_modeling_common",
    "test_configuration_common",
    "test_training_mixin",
    "test_fsdp_mixin",
    "test_tensor_parallel_mixin",
]

ABSENT = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {'output_hidden_states': True, 'dtype': 'float16', 'chunk_size_feed_forward': 3}\n"
    ),
    "distributed_testing_utils.py": """
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    torch.set_num_threads(1)


def _start_rank_processes(fn, args, nprocs):
    mp.spawn(fn, args=args, nprocs=nprocs)


def _rank(rank, world_size, port, function, arguments):
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size):
    def decorate(function):
        def run(*arguments):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            mp.spawn(_rank, args=(world_size, port, function, arguments), nprocs=world_size)

        return run

    return decorate
""",
}


def lay_out(archive: Path, target: Path) -> None:
    package = target / "hf_suite"
    for name, text in ABSENT.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            path = Path(member.name)
            if path.parent.name == "tests" and path.stem in SUITE:
                (package / path.name).write_bytes(tar.extractfile(member).read())


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]), Path(sys.argv[2]))
