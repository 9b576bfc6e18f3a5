"""A converted model and its dense original, one sequence: prefill, decoding, and a static cache that is compiled.

    python -m benchmarks.converted [--shape smollm2-135m] [--contexts 512 2048 8192 32768] [--static 2048]

Weights are random, of a real shape, in bf16. Writes results/speed-<shape>-<device>.json, a row as soon as it is there.
The rows of one context are measured in turn in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.conversion import DEVICE
from benchmarks.throughput import SHAPES, original
from benchmarks.timing import median_seconds, write
from pi_attention import PiPattern
from pi_attention.convert import convert

PATTERNS: dict[str, dict[str, Any]] = {
    "skips, gate": {"pattern": PiPattern(256, 256, 16), "gate": True},
    "skips, 4 sinks, gate": {"pattern": PiPattern(256, 256, 16, sinks=4), "gate": True},
    "skips, 4 sinks": {"pattern": PiPattern(256, 256, 16, sinks=4)},
}
VARIANTS = ("dense", *PATTERNS)
SMALL: dict[str, dict[str, Any]] = {
    name: options | {"pattern": PiPattern(8, 5, 4, sinks=options["pattern"].sinks)}
    for name, options in PATTERNS.items()
}
"""The same for a toy."""


def model_of(shape: str, variant: str, longest: int) -> Any:
    """With random weights, for evaluation."""
    dense = original(shape, longest, torch.bfloat16 if DEVICE == "cuda" else torch.float32, DEVICE)
    if variant == "dense":
        return dense
    return convert(dense, **(SMALL if shape == "toy" else PATTERNS)[variant]).to(DEVICE).eval()


def seconds(run: Callable[[], Any]) -> float:
    """Of one call, until its kernels have ended."""
    _wait()
    begun = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - begun


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def eager(model: Any, ids: Tensor) -> dict[str, float]:
    """Medians of a prefill, and of one-token steps after it, with a cache that grows or is bounded."""

    def prefill() -> Any:
        cache = model.new_cache() if hasattr(model, "new_cache") else DynamicCache()
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        _wait()
        return cache

    cache = prefill()
    found = {"prefill s": median_seconds(prefill, budget=2.0, most=9)}

    def step() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        _wait()

    return found | {"decode s": median_seconds(step, budget=2.0, most=50)}


def static(model: Any, ids: Tensor, new: int) -> dict[str, float]:
    """Two tokens at first, compilation included, and later steps, by `generate` with a static cache.

    A GPU's decoding steps are compiled by transformers; the first token comes from the prefill, which is not.
    """

    def generate(tokens: int) -> Tensor:
        options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "use_cache": True}
        return model.generate(ids, cache_implementation="static", **options)

    first = seconds(lambda: generate(2))
    generate(new)  # a larger cache, which later calls use again
    short, long = (min(seconds(lambda n=n: generate(n)) for _ in range(3)) for n in (2, new))
    found = {"static, first two tokens s": first}
    return found | ({"static, decode s": (long - short) / (new - 2)} if long > short else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=VARIANTS)
    parser.add_argument("--new", type=int, default=64, help="tokens that are decoded with a static cache")
    parser.add_argument("--static", type=int, nargs="*", help="contexts with a static cache, too; all by default")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    name = f"speed-{options.shape}-{device.replace(' ', '-').lower()}"
    rows: list[dict[str, Any]] = []
    for context in options.contexts:
        ids = torch.randint(3, SHAPES[options.shape]["vocab_size"], (1, context), device=DEVICE)
        for variant in options.variants:
            torch._dynamo.reset()
            model = model_of(options.shape, variant, context + options.new + 64)
            row = {"context": context, "variant": variant, **eager(model, ids)}
            if options.static is None or context in options.static:
                row |= static(model, ids, options.new)
            rows.append(row)
            print(row, flush=True)
            write(name, {"model": options.shape, "device": device, "speed": rows})


if __name__ == "__main__":
    main()
