"""Coordinated heads on a GPU, beside the same pattern without phases and a window of as many keys: checked, then timed.

python -m benchmarks.coordinated    # writes results/coordinated-<device>.json
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from benchmarks.gpu import HEADS, ceilings, check, finished, floors, ours, problem, time_both
from benchmarks.timing import machine, write
from pi_attention import PiPattern, coordinated_heads, pi_attention

LENGTH = 32768
PATTERNS = [(16, 4, 64), (128, 4, 128)]
"""Window, period and skips."""


def row(shape: tuple[int, int, int], dim: int, groups: int, limits: tuple[float, float]) -> dict[str, Any]:
    """One pattern of one head dim with so many key heads."""
    window, period, skips = shape
    pattern = coordinated_heads(window, skips, HEADS, period)
    inputs, grad = problem(LENGTH, dim, groups)
    short = [x[:, :, :4096] for x in inputs]
    check("pi", ours(pattern)(*short), pi_attention(*short[:3], pattern, gate=short[3], impl="blocked"))
    result: dict[str, Any] = {"S": LENGTH, "D": dim, "key heads": groups, "pattern": f"{window},{period},{skips}"}
    result["pi"] = time_both(ours(pattern), inputs, grad)
    result["without phases"] = time_both(ours(PiPattern(window, period, skips)), inputs, grad)
    result["our window of as many keys"] = time_both(ours(PiPattern(window + skips, 1, 0)), inputs, grad)
    return finished(result | floors(pattern, LENGTH, dim, limits, groups))


def main() -> None:
    device = torch.cuda.get_device_name()
    limits = ceilings()
    print(device, f"{limits[0] / 1e12:.2f} TB/s, {limits[1] / 1e12:.0f} TFLOP/s", machine(), flush=True)
    head = {"gpu": device, "copy bytes/s": limits[0], "matrix flop/s": limits[1], "H": HEADS, "dtype": "bfloat16"}
    rows: list[dict[str, Any]] = []
    for shape, dim, groups in itertools.product(PATTERNS, (128, 64), (HEADS, HEADS // 4)):
        rows.append(row(shape, dim, groups, limits))
        write(f"coordinated-{device.replace(' ', '-').lower()}", head | {"rows": rows})


if __name__ == "__main__":
    main()
