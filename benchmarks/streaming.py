"""A converted model over a text far longer than it was trained for.

    python -m benchmarks.streaming MODEL_DIR --text FILE [--tokens 200000] [--train-text FILE --steps 60]

Perplexity by position while the text streams through the bounded cache in chunks, and bytes of the cache. Writes
results/streaming-<name>.json.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.conversion import DEVICE
from benchmarks.timing import write
from pi_attention import PiPattern
from pi_attention.convert import convert
from pi_attention.data.packing import PackedBlocks
from pi_attention.training.finetune import LEARNING_RATES, finetune

CHUNK, SHOWN = 1024, 16384
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200_000, help="streamed")
    parser.add_argument("--train-text", type=Path, help="fine-tune on it before")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = tokenizer(options.text.read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    tokens = tokens[: options.tokens + 1]
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    result: dict[str, Any] = {"model": options.model.name, "text": options.text.name, "device": device}
    result["tokens"] = len(tokens) - 1

    rows: list[dict[str, Any]] = []
    for name, pattern in PATTERNS.items():
        dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(DEVICE)
        model = convert(dense, pattern, gate=pattern.skips != 0)
        for trained in ("nothing", "all") if options.train_text else ("nothing",):
            if trained == "all":
                blocks = PackedBlocks([options.train_text.read_text()], tokenizer, 8192)
                with tempfile.TemporaryDirectory() as folder:
                    rate = LEARNING_RATES["all"]
                    finetune(model, blocks, steps=options.steps, part="all", learning_rate=rate, out=Path(folder))
            with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                rows.append({"variant": name, "trained": trained, **streamed(model.eval(), tokens)})
            print(rows[-1], flush=True)
            write(f"streaming-{options.model.name}", result | {"streaming": rows})


if __name__ == "__main__":
    main()
