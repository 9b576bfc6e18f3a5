"""The blocked implementation on a CPU, against dense attention and FlexAttention, and cached decoding.

    python -m benchmarks.cpu            # checks, then times, then writes results/cpu.json

Correctness first: each row is compared with its rivals before it is timed; a mismatch stops the benchmark.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.timing import median_seconds, write
from pi_attention import PiPattern, pi_attention
from pi_attention.cache import LayerCache
from pi_attention.masks import dense_mask, flex_mask_mod

B, H, D = 1, 8, 64
PATTERN = PiPattern(window=64, period=64, skips=16)
LENGTHS = [512, 1024, 2048, 4096, 8192, 16384]
MASKED_DENSE_UP_TO = 8192  # its backward pass holds T × S scores
THREADS = 2


def problem(length: int, grad: bool) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, length, D, requires_grad=grad) for _ in range(3)]


def forward_and_backward(attend: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    grad = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad)


def rivals(length: int) -> dict[str, Callable[..., Tensor]]:
    attends: dict[str, Callable[..., Tensor]] = {
        "pi blocked": lambda q, k, v: pi_attention(q, k, v, PATTERN, impl="blocked"),
        "sdpa causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    if length <= MASKED_DENSE_UP_TO:
        mask = dense_mask(PATTERN, length, length)
        attends["sdpa masked"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attends


def flex(length: int) -> Callable[..., Tensor]:
    blocks = create_block_mask(flex_mask_mod(PATTERN, length, length), None, None, length, length, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks)


def check(name: str, got: Tensor, want: Tensor) -> None:
    error = float((got - want).norm() / want.norm())
    if not error < 1e-5:
        raise SystemExit(f"{name} is wrong: relative error {error:.2e}")


def operator_rows(lengths: list[int], with_flex: bool) -> list[dict[str, Any]]:
    rows = []
    for length in lengths:
        attends, plain, graph = rivals(length), problem(length, False), problem(length, True)
        if "sdpa masked" in attends:
            check(f"pi blocked at {length}", attends["pi blocked"](*plain), attends["sdpa masked"](*plain))
        row: dict[str, Any] = {"S": length}
        for name, attend in attends.items():
            with torch.no_grad():
                row[f"{name} forward ms"] = 1e3 * median_seconds(lambda: attend(*plain))  # noqa: B023
            row[f"{name} forward+backward ms"] = 1e3 * median_seconds(forward_and_backward(attend, graph))
        if with_flex:
            row |= flex_row(length, plain, attends["pi blocked"])
        for kind in ("forward", "forward+backward"):
            row[f"speed-up over sdpa causal, {kind}"] = row[f"sdpa causal {kind} ms"] / row[f"pi blocked {kind} ms"]
        rows.append(row)
        print(
            {key: round(value, 2) for key, value in row.items() if isinstance(value, float)} | {"S": length}, flush=True
        )
    return rows


def flex_row(length: int, inputs: list[Tensor], ours: Callable[..., Tensor]) -> dict[str, Any]:
    """Compiled FlexAttention over the union mask, forward only (it has no backward pass on CPUs)."""
    try:
        with torch.no_grad():
            attend = flex(length)
            check(f"flex at {length}", attend(*inputs), ours(*inputs))
            return {"flex forward ms": 1e3 * median_seconds(lambda: attend(*inputs))}
    except Exception as error:  # inductor fails in many ways
        return {"flex forward ms": None, "flex error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def peak_extra_memory(which: str, length: int) -> int:
    """Bytes of resident memory that forward and backward add at their peak, measured in a process of its own."""
    code = f"from benchmarks.cpu import measure_memory; measure_memory({which!r}, {length})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(result.stdout)


def measure_memory(which: str, length: int) -> None:
    torch.set_num_threads(THREADS)
    for size in (128, length):  # the first call loads libraries
        inputs = problem(size, True)
        mask = dense_mask(PATTERN, size, size) if which == "sdpa masked" else None
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        if mask is None:
            attend = rivals(MASKED_DENSE_UP_TO + 1)[which]
        else:
            attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # noqa: B023, E731
        forward_and_backward(attend, inputs)()
    print(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes of this process's resident memory: now (VmRSS) or at the peak (VmHWM). Linux."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def decoding_rows(positions: list[int]) -> list[dict[str, Any]]:
    """Time of one cached token, operator and cache update, at positions far apart; and the cache's bytes."""
    cache, rows = LayerCache(PATTERN), []
    step = [torch.randn(B, H, 1, D) for _ in range(3)]

    def decode() -> None:
        key, value = cache.update(step[1], step[2])
        pi_attention(step[0], key, value, PATTERN)

    with torch.no_grad():
        for position in positions:
            rest = position - cache.length
            for first in range(0, rest, 4096):
                chunk = min(4096, rest - first)
                cache.update(torch.randn(B, H, chunk, D), torch.randn(B, H, chunk, D))
            decode()
            seconds = median_seconds(decode, most=400, budget=2.0)
            rows.append({"position": position, "microseconds": 1e6 * seconds, "cache bytes": cache.nbytes})
    print(rows, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--no-flex", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    operator = operator_rows(options.lengths, not options.no_flex)
    longest = max(options.lengths)
    memory = {which: peak_extra_memory(which, longest) for which in ("pi blocked", "sdpa causal", "sdpa masked")}
    print(memory, flush=True)
    result = {
        "problem": {"B": B, "H": H, "D": D, "dtype": "float32", "pattern": str(PATTERN)},
        "operator": operator,
        "peak extra bytes, forward+backward": {"S": longest} | memory,
        "decoding": decoding_rows([2000, 100_000]),
    }
    print(write("cpu", result))


if __name__ == "__main__":
    main()
