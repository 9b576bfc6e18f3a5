"""A converted model over a text far longer than it was trained for, and its speed beside the dense original.

    python -m benchmarks.streaming MODEL_DIR --text FILE [--tokens 200000] [--train-text FILE --steps 60]

Perplexity by position while the text streams through the bounded cache in chunks, bytes of the cache; then tokens a
second of prefill and of decoding at several contexts. Writes results/streaming-<name>.json and speed-<name>.json.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.conversion import DEVICE
from benchmarks.timing import median_seconds, write
from pi_attention import PiPattern
from pi_attention.convert import convert
from pi_attention.data.packing import PackedBlocks
from pi_attention.training.finetune import LEARNING_RATES, finetune

CHUNK, SHOWN = 1024, 16384
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
PATTERNS = {
    "window + sinks": PiPattern(268, 1, 0, sinks=4),
    "window + sinks + skips": PiPattern(252, 512, 16, sinks=4),
}


@torch.no_grad()
def streamed(model: Any, tokens: Tensor) -> dict[str, Any]:
    """Perplexity over each run of SHOWN tokens, and the most bytes that the cache held."""
    cache, losses, most = model.new_cache(), [], 0
    for start in range(0, len(tokens) - 1, CHUNK):
        chunk = tokens[start : start + CHUNK + 1].to(DEVICE)
        logits = model(chunk[None, :-1], past_key_values=cache, use_cache=True).logits[0]
        losses.append(F.cross_entropy(logits.float(), chunk[1:], reduction="none").cpu())
        most = max(most, cache.nbytes)
    parts = torch.cat(losses).split(SHOWN)
    return {
        "first position": [SHOWN * i for i in range(len(parts))],
        "perplexity": [math.exp(float(part.mean())) for part in parts],
        "cache bytes": most,
    }


@torch.no_grad()
def speed(model: Any, new_cache: Callable[[], Any], context: int) -> dict[str, float]:
    """Tokens a second of a prefill of `context` tokens, and of one-token steps after it."""
    ids = torch.randint(100, 1000, (1, context), device=DEVICE)

    def synchronised(run: Callable[[], Any]) -> Callable[[], Any]:
        def timed() -> None:
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        return timed

    def prefill() -> Any:
        cache = new_cache()
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    seconds = median_seconds(synchronised(prefill), budget=2.0, most=5)
    cache = prefill()
    step = synchronised(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True))
    decoding = median_seconds(step, budget=2.0, most=30)
    return {"prefill tokens/s": context / seconds, "decode tokens/s": 1 / decoding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200_000, help="streamed; 0 for the speed alone")
    parser.add_argument("--train-text", type=Path, help="fine-tune on it before")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--contexts", type=int, nargs="*", default=[2048, 8192, 32768, 131072])
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = tokenizer(options.text.read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    tokens = tokens[: options.tokens + 1]
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    result: dict[str, Any] = {"model": options.model.name, "text": options.text.name, "device": device}
    result["tokens"] = len(tokens) - 1

    rows: dict[str, list[dict[str, Any]]] = {"streaming": [], "speed": []}

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(DEVICE)

    def keep(kind: str, row: dict[str, Any]) -> None:
        print(row, flush=True)
        rows[kind].append(row)
        write(f"{kind}-{options.model.name}", result | {kind: rows[kind]})

    for name, pattern in PATTERNS.items() if options.tokens else ():
        model = convert(load(), pattern)
        for trained in ("nothing", "all") if options.train_text else ("nothing",):
            if trained == "all":
                blocks = PackedBlocks([options.train_text.read_text()], tokenizer, 8192)
                with tempfile.TemporaryDirectory() as folder:
                    rate = LEARNING_RATES["all"]
                    finetune(model, blocks, steps=options.steps, part="all", learning_rate=rate, out=Path(folder))
            with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                keep("streaming", {"variant": name, "trained": trained, **streamed(model.eval(), tokens)})
    for context in options.contexts:
        dense = load().to(DTYPE).eval()
        keep("speed", {"variant": "dense", "context": context, **speed(dense, DynamicCache, context)})
        pattern = PATTERNS["window + sinks + skips"]
        ours = convert(dense, pattern).eval()
        row = speed(ours, lambda ours=ours: ours.new_cache(), context)  # type: ignore[misc]
        keep("speed", {"variant": "window + sinks + skips", "context": context, **row})


if __name__ == "__main__":
    main()
