"""Measure tile sizes for each kernel, from which `pi_attention/ops/fused/tuning.py` is filled by hand.

    python -m benchmarks.tune [--dim 128] [--workers 14]
    python -m benchmarks.tune --dim 256 --window 512 --heads 4 --key-heads 1 --only local    # the windows of Gemma 3

Workers first compile every candidate into Triton's disk cache; then one process times them. Kernels that only Hopper
has are left out: their tiles are their own.
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
from pi_attention.ops.fused.hopper import serves as hopper
from pi_attention.ops.fused.launch import backward_plan, described_keys, forward_plan, run_forward
from pi_attention.ops.fused.tiling import problem_of
from pi_attention.ops.fused.tuning import Tiles

SKIPS = 40
"""More than the one-pass backward kernel serves, and fewer than a row needs to be bound by arithmetic (`MANY`)."""
PERIOD = 256
KERNELS = ["forward", "backward query", "backward key"]


def candidates(skip: bool, kernel: str, dim: int) -> Iterator[Tiles]:
    if dim > 128 and not skip:  # sums of a row fill the registers
        sizes, stages = [(32, 32), (64, 32), (64, 64), (128, 32), (128, 64)], (1, 2, 3)
    elif skip:
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
    """The kernels of one band on one problem; the local band stands alone, if it is the only one that is asked for."""

    def __init__(self, skip: bool, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        heads = (options.heads, options.key_heads, options.key_heads, options.heads)
        sizes = [(1, count, options.length, options.dim) for count in heads]
        *self.inputs, self.grad = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in sizes)
        self.skip = skip
        skips = 0 if options.only.startswith("local") else SKIPS
        pattern = PiPattern(options.window, PERIOD if skips else 1, skips)
        self.problem = problem_of(*self.inputs, None, None, pattern, True, options.dim**-0.5)
        self.outputs = run_forward(*self.inputs, None, None, None, self.problem)
        self.terms = torch.randn(4, *self.outputs[1].shape, device="cuda")
        self.grads = [torch.empty_like(x) for x in self.inputs]

    def run(self, kernel: str) -> None:
        query, key, value = self.inputs
        out, lse = self.outputs[:2]
        skip_out, skip_lse = (out, lse) if self.outputs[2] is None else self.outputs[2:]
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
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-heads", type=int, default=16)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--shard", type=int, default=None)
    parser.add_argument("--only", default="", help='kernels whose name begins so, such as "local" or "skip forward"')
    options = parser.parse_args()
    hopper.MEASURED = False
    tuning.HOPPER = {kernel: {} for kernel in KERNELS}  # candidates stand in the other tables
    todo = [
        (skip, kernel, tiles)
        for skip in (False, True)
        for kernel in KERNELS
        for tiles in candidates(skip, kernel, options.dim)
        if f"{'skip' if skip else 'local'} {kernel}".startswith(options.only)
    ]
    if options.shard is not None:
        todo = todo[options.shard :: options.workers]
    else:
        alike = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items() if name != "shard"]
        command = [sys.executable, "-m", "benchmarks.tune", *alike]
        shards = [subprocess.Popen([*command, f"--shard={i}"]) for i in range(options.workers)]
        for shard in shards:
            shard.wait()
    benches = {skip: Bench(skip, options) for skip in dict.fromkeys(skip for skip, *_ in todo)}
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
