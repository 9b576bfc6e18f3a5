"""Memory of a training step at sizes and numbers of ranks that are not at hand: layouts compared on fake ranks.

    python -m benchmarks.memory

One process plays one rank of a fake process group; FSDP2, tensor parallelism and the halo exchange run on tensors
without data, and PyTorch's memory tracker counts what would be allocated. A model's peak is linear in its layers, so
each layout is tracked with a few layers and continued to all of them. Writes results/memory.json.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # the kernels' operators on CPU tensors, which have no data here

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.sizes import config_of
from benchmarks.timing import RESULTS, write
from pi_attention import PiPattern
from pi_attention.accounting import Sizes
from pi_attention.bill import MODELS
from pi_attention.distributed import Layout
from pi_attention.models import PiForCausalLM
from pi_attention.ops import api
from pi_attention.training.step import Parallel
from pi_attention.training.train import enable_checkpointing

PATTERN = PiPattern(256, 256, 16)
CONTEXT = 131072
LAYOUTS = {
    8: [("dp=8", 2), ("dp=8", 3), ("dp=2,cp=4", 3), ("cp=8", 3), ("tp=8", 3), ("tp=2,cp=4", 3)],
    64: [("dp=64", 2), ("dp=64", 3), ("dp=8,cp=8", 3), ("cp=64", 3), ("dp=8,tp=8", 3), ("tp=8,cp=8", 3)],
    1024: [("dp=128,cp=8", 3), ("dp=16,cp=64", 3), ("cp=1024", 3)],
}
"""Layouts and ZeRO stages by the number of ranks."""
LONG = [(model, 1 << power) for model in ("1b", "8b") for power in (17, 20, 22)]
"""Models and contexts that eight ranks share, with the loss by slices."""
SLICE = 4096
"""Tokens of the slices by which the loss is computed, where it is."""
FEW, MORE = 6, 10
"""Layers tracked: with fewer, the peak of a small shard may still lie at the logits, and not grow with the layers."""


def with_data(make: Callable[..., None]) -> Callable[..., None]:
    """A mesh's constructor that finds its ranks by tensors with data, also where the others are fake."""

    def made(*args: Any, **options: Any) -> None:
        with unset_fake_temporarily():
            make(*args, **options)

    return made


def peak(sizes: Sizes, layout: Layout, zero: int, loss_slice: int | None, context: int = CONTEXT) -> int:
    """Bytes of one rank at the peak of its second step, as the memory tracker counts them."""
    dist.init_process_group("fake", rank=layout.ranks // 2, world_size=layout.ranks, store=FakeStore())
    mesh = layout.mesh("cpu")
    mesh["dp", "cp"]._flatten("dp_cp")
    config = config_of(sizes, PATTERN, tie_word_embeddings=False, loss_slice=loss_slice)
    with (
        FakeTensorMode(),
        patch.object(DeviceMesh, "__init__", with_data(DeviceMesh.__init__)),
        patch.object(api, "why_not_triton", lambda query: None),  # no product is computed here
    ):
        model = PiForCausalLM(config).train()
        enable_checkpointing(model)
        parallel = Parallel(model, mesh, zero=zero, bf16=True)
        model.model._choose_implementation = lambda: None
        for layer in model.model.layers:
            layer.self_attn.impl = "triton"
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
        ids = torch.randint(sizes.vocab_size, (1, context))
        block = {"input_ids": ids, "labels": ids, "segment_ids": torch.zeros(1, context, dtype=torch.int32)}
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):
                tracker.reset_mod_stats()
                parallel.loss(block, layout.dp * (context - 1)).backward()
                optimizer.step()
                optimizer.zero_grad()
        snapshot = tracker.get_tracker_snapshot("peak")
    dist.destroy_process_group()
    return sum(parts["Total"] for parts in snapshot.values())


def continued(sizes: Sizes, layout: Layout, zero: int, loss_slice: int | None, context: int = CONTEXT) -> int:
    """Bytes at the peak of the whole model, from two with few layers."""
    cases = [replace(sizes, num_hidden_layers=layers) for layers in (FEW, MORE)]
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:  # a process group is made once
        few, more = pool.map(peak, cases, *([value] * 2 for value in (layout, zero, loss_slice, context)))
    return few + (more - few) * (sizes.num_hidden_layers - FEW) // (MORE - FEW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["8b", "70b"])
    parser.add_argument("--again", action="store_true", help="track also what the result file has")
    options = parser.parse_args()
    file = RESULTS / "memory.json"
    kept = json.loads(file.read_text()) if file.exists() and not options.again else {}
    rows, long = kept.get("rows", []), kept.get("long", [])
    about = {"S": CONTEXT, "pattern": "256, 256, 16", "layers": [FEW, MORE], "loss slice": SLICE}
    cases = [
        {"model": name, "ranks": ranks, "layout": layout, "zero": zero}
        for name in options.models
        for ranks, layouts in LAYOUTS.items()
        for layout, zero in layouts
    ]
    for case in cases:
        sizes, layout = MODELS[case["model"]], Layout.parse(case["layout"])
        row = next((row for row in rows if case.items() <= row.items()), None)
        if row is None:
            rows.append(row := dict(case))
        for kind, loss_slice in (("tracked bytes", None), ("tracked bytes, loss by slices", SLICE)):
            if kind not in row:
                begun = time.perf_counter()
                row[kind] = continued(sizes, layout, case["zero"], loss_slice)
                print(json.dumps(row), f"{time.perf_counter() - begun:.0f} s", flush=True)
                write("memory", about | {"rows": rows, "long": long})
    for name, context in LONG:
        case = {"model": name, "ranks": 8, "layout": "cp=8", "S": context}
        if not any(case.items() <= row.items() for row in long):
            found = continued(MODELS[name], Layout(cp=8), 3, SLICE, context)
            long.append({**case, "tracked bytes, loss by slices": found})
            print(json.dumps(long[-1]), flush=True)
            write("memory", about | {"rows": rows, "long": long})


if __name__ == "__main__":
    main()
