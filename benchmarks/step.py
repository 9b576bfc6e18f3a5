"""A training step of a 124 M model on a GPU: π against ring-local of the same window, and against dense.

    python -m benchmarks.step [--lengths 2048 8192 32768 131072]      # writes results/step-<device>.json

A step is forward, backward and AdamW over 131,072 tokens in bf16, each block compiled by torch.compile.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import torch

from benchmarks.timing import machine, write
from pi_attention.models import PiConfig, PiForCausalLM

TOKENS = 131072
VARIANTS: dict[str, dict[str, Any]] = {
    "pi": {"gate": True},
    "ring-local": {"skips": 0, "gate": False},
    "dense": {"layer_patterns": ["dense"]},
}


def model_of(variant: str) -> PiForCausalLM:
    torch.manual_seed(0)
    config = PiConfig(
        vocab_size=32768,
        hidden_size=768,
        intermediate_size=2560,
        num_hidden_layers=12,
        num_attention_heads=12,
        **({"window": 256, "period": 256, "skips": 16, "tie_word_embeddings": True} | VARIANTS[variant]),
    )
    return PiForCausalLM(config).cuda().to(torch.bfloat16).train()


def row(variant: str, length: int, steps: int = 6) -> dict[str, Any]:
    torch._dynamo.reset()
    model = model_of(variant)
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, 32768, (TOKENS // length, length), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps + 2):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    if not torch.isfinite(loss):
        raise SystemExit(f"{variant} at {length}: the loss is {float(loss)}")
    second = sorted(times[2:])[steps // 2]
    result = {
        "variant": variant,
        "S": length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "step ms": 1e3 * second,
        "tokens/s": TOKENS / second,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
        "first steps s": times[0],
    }
    print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768, 131072])
    options = parser.parse_args()
    device = torch.cuda.get_device_name()
    print(device, machine(), flush=True)
    rows = []
    for length, variant in itertools.product(options.lengths, VARIANTS):
        rows.append(row(variant, length))
        path = write(f"step-{device.replace(' ', '-').lower()}", {"gpu": device, "tokens": TOKENS, "rows": rows})
    print(path)


if __name__ == "__main__":
    main()
