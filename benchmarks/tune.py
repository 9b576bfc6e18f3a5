"""Measure tile sizes for each kernel, from which `pi_attention/ops/fused/tuning.py` is filled by hand.

    python -m benchmarks.tune [--dim 128] [--workers 14]

Workers first compile every candidate into Triton's disk cache; then one process times them.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Iterator

import torch
from triton.testing import do_bench

from pi_attention import PiPattern
from pi_attention.ops.fused import tuning
from pi_attention.ops.fused.launch import backward_plan, described_keys, forward_plan, run_forward
from pi_attention.ops.fused.tiling import problem_of
from pi_attention.ops.fused.tuning import Tiles

PATTERN = PiPattern(256, 256, 48)  # more skips than the one-pass backward kernel serves
KERNELS = ["forward", "backward query", "backward key"]


def candidates(skip: bool, kernel: str) -> Iterator[Tiles]:
    if skip:
        sizes = [(32, 16), (64, 16), (64, 32), (128, 16)]
        stages = (1, 2, 3, 4) if kernel == "forward" else (1, 2, 3)
    elif kernel == "backward key":
        sizes, stages = [(64, 32), (64, 64), (128, 32), (128, 64)], (1, 2, 3)
    else:
        sizes, stages = [(64, 32), (64, 64), (128, 32), (128, 64)], (2, 3, 4)
    for (rows, step), warps, stage in itertools.product(sizes, (4, 8), stages):
        if rows * step // warps >= 128:
            yield Tiles(rows, step, warps, stage)


class Bench:
    """The kernels of one band on one problem."""

    def __init__(self, skip: bool, length: int, dim: int) -> None:
        torch.manual_seed(0)
        tensors = [torch.randn(1, 16, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        *self.inputs, self.grad = tensors
        self.skip = skip
        self.problem = problem_of(*self.inputs, None, None, PATTERN, True, dim**-0.5)
        self.outputs = run_forward(*self.inputs, None, None, None, self.problem)
        self.terms = torch.randn(4, *self.outputs[1].shape, device="cuda")
        self.grads = [torch.empty_like(x) for x in self.inputs]

    def run(self, kernel: str) -> None:
        query, key, value = self.inputs
        out, lse, skip_out, skip_lse = self.outputs
        if kernel == "forward":
            plan = forward_plan(self.problem)
            step, other = (plan.skip, (out, lse)) if self.skip else (plan.local, (skip_out, skip_lse))
            keys = (key, value) if self.skip else described_keys(key, value, plan.block)
            step((query, *keys, query, query, lse, *other, key, value, out, lse))
            return
        plan = backward_plan(self.problem, self.grad.stride(), False, False)
        rows = (self.grad, skip_lse if self.skip else lse, self.terms)
        if kernel == "backward query":
            step = plan.skip[0] if self.skip else plan.query
            keys = (key, value) if self.skip else described_keys(key, value, plan.block)
            of_rows = (out, skip_out, skip_lse, lse, lse, lse, self.terms)
            step((query, *keys, query, query, *rows, key, value, self.grads[0], *of_rows))
        else:
            step = plan.skip[1] if self.skip else plan.key
            step((query, key, value, query, query, query, *rows, *self.grads[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--shard", type=int, default=None)
    parser.add_argument("--only", default="", help='one kernel, such as "skip backward"')
    options = parser.parse_args()
    todo = [
        (skip, kernel, tiles)
        for skip in (False, True)
        for kernel in KERNELS
        for tiles in candidates(skip, kernel)
        if options.only in ("", f"{'skip' if skip else 'local'} {kernel}")
    ]
    if options.shard is not None:
        todo = todo[options.shard :: options.workers]
    else:
        command = [sys.executable, "-m", "benchmarks.tune", f"--dim={options.dim}", f"--workers={options.workers}"]
        command += [f"--only={options.only}"]
        shards = [subprocess.Popen([*command, f"--shard={i}", "--length=2048"]) for i in range(options.workers)]
        for shard in shards:
            shard.wait()
    benches = {skip: Bench(skip, options.length, options.dim) for skip in (False, True)}
    times: dict[tuple[bool, str], list[tuple[float, Tiles]]] = {}
    for skip, kernel, tiles in todo:
        (tuning.SKIP if skip else tuning.LOCAL)[kernel] = {options.dim: tiles}
        forward_plan.cache_clear()
        backward_plan.cache_clear()
        try:
            if options.shard is not None:
                benches[skip].run(kernel)
                continue
            run = benches[skip].run
            time = do_bench(lambda: run(kernel), warmup=5, rep=20, return_mode="median")  # noqa: B023
            times.setdefault((skip, kernel), []).append((1e3 * float(time), tiles))
        except Exception as error:  # out of shared memory, mostly
            if options.shard is None:
                print(skip, kernel, tiles, type(error).__name__)
    for (skip, kernel), found in times.items():
        print("skip" if skip else "local", kernel)
        for time, tiles in sorted(found)[:5]:
            print(f"    {time:8.1f} us  {tiles}")


if __name__ == "__main__":
    main()
