"""A decoded token on a GPU: π-Attention over its bounded cache against dense attention over all keys.

    python -m benchmarks.decode                      # writes results/decode-<device>.json

The times are of the operator in a replayed CUDA graph, and called from Python ("eager").
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import HEADS, MAIN, check, median, replayed
from benchmarks.timing import machine, write
from pi_attention import pi_attention

DIM = 128
CONTEXTS = [2048, 8192, 32768, 131072, 1048576]
BATCHES = [1, 8, 64]
MOST_BYTES = 80 * 2**30


def both(run: Callable[[], Any]) -> dict[str, float]:
    return {"graph us": replayed(run), "eager us": median(run)}


def row(batch: int, context: int) -> dict[str, Any]:
    """`context` tokens are known; the next one attends to them and to itself."""
    torch.manual_seed(0)
    reach = MAIN.reach
    assert reach is not None
    kept = min(context, reach + 1)
    result: dict[str, Any] = {"B": batch, "context": context}

    def random(tokens: int) -> Tensor:
        return torch.randn(batch, HEADS, tokens, DIM, device="cuda", dtype=torch.bfloat16)

    query, key, value = random(1), random(kept), random(kept)
    gate = torch.randn(batch, HEADS, 1, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        got = pi_attention(query, key, value, MAIN, gate=gate)
        check("decoding", got, pi_attention(query, key, value, MAIN, gate=gate, impl="blocked"))
        result["pi"] = both(lambda: pi_attention(query, key, value, MAIN, gate=gate))
        result["pi"]["cache bytes"] = 2 * key.nbytes
        dense_bytes = 4 * batch * HEADS * context * DIM
        if dense_bytes <= MOST_BYTES:
            key, value = random(context), random(context)
            result["dense"] = both(lambda: F.scaled_dot_product_attention(query, key, value))
            result["dense"]["cache bytes"] = dense_bytes
            result["faster, in graph"] = result["dense"]["graph us"] / result["pi"]["graph us"]
            result["faster, eager"] = result["dense"]["eager us"] / result["pi"]["eager us"]
    print(result, flush=True)
    return result


def main() -> None:
    device = torch.cuda.get_device_name()
    print(device, machine(), flush=True)
    rows = [row(batch, context) for batch, context in itertools.product(BATCHES, CONTEXTS)]
    head = {"gpu": device, "H": HEADS, "D": DIM, "pattern": str(MAIN), "dtype": "bfloat16"}
    print(write(f"decode-{device.replace(' ', '-').lower()}", head | {"rows": rows}))


if __name__ == "__main__":
    main()
