"""What forms of a language model cost to serve: prefill, a decoded token and the bytes of the cache, by the context.

    python -m benchmarks.hybrids [--lengths 8192 32768 131072]    # on a GPU; writes results/hybrids-<device>.json
    python -m benchmarks.hybrids --toy                            # tiny, on any machine; writes nothing

The forms are those of `python -m experiments run hybrids`, which measures how well they predict; here they have 124 M
parameters with random weights, in bf16. Prompts are read in chunks, and decoding is eager.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import machine, write
from experiments.forms import BASELINE, attention
from pi_attention.models import PiConfig, PiForCausalLM

REAL: dict[str, Any] = {"vocab_size": 32768, "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12}
TOY: dict[str, Any] = {"vocab_size": 99, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 12}
HEADS = 12
WHOLE = ("dense", "coordinated 4", "coordinated 8")
RESTS = (BASELINE, "coordinated 4", "dilated heads")
VARIANTS = (*RESTS, "dense", *(f"{rest} + {whole}, 1 in {n}" for n in (12, 6, 4) for whole in WHOLE for rest in RESTS))
NEW = 64
"""Tokens that are decoded."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model_of(variant: str, keys: int, context: int, toy: bool) -> PiForCausalLM:
    """With random weights; every query of a head sees `keys` keys at most, where its layer does not see everything."""
    torch.manual_seed(0)
    fields = attention({"variant": variant, "keys": keys, "heads": HEADS, "context": context})
    sizes = (TOY if toy else REAL) | {"num_attention_heads": HEADS, "max_position_embeddings": context + NEW}
    model = PiForCausalLM(PiConfig(**sizes, **fields, tie_word_embeddings=True)).to(DEVICE)
    return (model if toy else model.to(torch.bfloat16)).eval()


def now() -> float:
    """The time when the device has done everything so far."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def served(model: PiForCausalLM, prompt: Tensor, chunk: int) -> dict[str, float]:
    """Seconds until the first token and of a decoded one, and the cache after the prompt and after the text."""
    begun, cache = now(), None
    for part in prompt.split(chunk, dim=1):
        out = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
    token = out.logits[:, -1:].argmax(-1)
    first, held = now() - begun, cache.nbytes
    times = []
    for _ in range(NEW):
        begun = now()
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        times.append(now() - begun)
    caches = {"cache bytes after the prompt": held, "cache bytes": cache.nbytes}
    return {"prefill s": first, "decoded token s": statistics.median(times)} | caches


def row(variant: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the repeats; the first run, which compiles the kernels, does not count."""
    model = model_of(variant, options.keys, length, options.toy)
    prompt = torch.randint(0, model.config.vocab_size, (1, length), device=DEVICE)
    runs = [served(model, prompt, options.chunk) for _ in range(options.repeats + 1)][1:]
    found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
    return {"variant": variant, "S": length, "keys": options.keys, **found, "peak GiB": peak}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of the prompt; 8192 32768 131072 by default")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="FORM", help="all of them")
    parser.add_argument("--keys", type=int, help="of a query; 320 by default")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens of the prompt that are read at a time")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which medians are taken")
    parser.add_argument("--toy", action="store_true", help="a tiny model and short prompts, in float32")
    options = parser.parse_args(arguments)
    if DEVICE == "cpu" and not options.toy:
        raise SystemExit("benchmarks.hybrids needs a CUDA GPU: add --toy for tiny sizes on a CPU.")
    lengths = options.lengths or ([40, 80] if options.toy else [8192, 32768, 131072])
    options.keys = options.keys or (10 if options.toy else 320)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(device, machine(), flush=True)
    rows: list[dict[str, Any]] = []
    for length in lengths:
        for variant in options.variants:
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rows.append(row(variant, length, options))
            print(rows[-1], flush=True)
            if not options.toy:
                head = {"gpu": device, "dtype": "bfloat16", "chunk": options.chunk, "new tokens": NEW, "sizes": REAL}
                write(f"hybrids-{device.replace(' ', '-').lower()}", head | {"heads": HEADS, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
