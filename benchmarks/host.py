"""An eager call at short lengths, where the host's part counts, beside scaled_dot_product_attention: end to end.

python -m benchmarks.host    # writes results/host-<device>.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import HEADS, MAIN, ours, problem, sdpa
from benchmarks.timing import machine, write

LENGTHS = (128, 512, 1024, 2048, 4096, 8192)
CALLS = 200


def microseconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Medians of a call until its kernels have ended, and until the call returns."""
    for _ in range(20):
        run()
    ended, returned = [], []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        returned.append(time.perf_counter() - begun)
        torch.cuda.synchronize()
        ended.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(ended), 1e6 * statistics.median(returned)


def row(length: int) -> dict[str, Any]:
    """Forward without gradients, and forward + backward, of both."""
    inputs, grad = problem(length, 128)
    result: dict[str, Any] = {"S": length, "D": 128}
    for name, attend, wanted in (("pi", ours(MAIN), inputs), ("sdpa causal", sdpa(), inputs[:3])):

        def forward(attend: Callable[..., Any] = attend) -> None:
            with torch.no_grad():
                attend(*inputs)

        def step(attend: Callable[..., Any] = attend, wanted: Any = wanted) -> None:
            torch.autograd.grad(attend(*inputs), wanted, grad)

        for kind, run in (("forward", forward), ("forward+backward", step)):
            ended, returned = microseconds(run)
            result |= {f"{name} {kind} us": ended, f"{name} {kind}, host us": returned}
    return result


def main() -> None:
    device = torch.cuda.get_device_name()
    print(device, machine(), flush=True)
    rows = []
    for length in LENGTHS:
        rows.append(row(length))
        print(rows[-1], flush=True)
        write(
            f"host-{device.replace(' ', '-').lower()}", {"gpu": device, "H": HEADS, "dtype": "bfloat16", "rows": rows}
        )


if __name__ == "__main__":
    main()
