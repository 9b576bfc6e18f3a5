"""What a form costs to serve: seconds until the first token, of a decoded token, and bytes of the cache.

The forms are those of the hybrids, which measure how well they predict. Weights are random and in bf16, prompts are
read in chunks, and decoding is eager.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from torch import Tensor

from experiments.experiment import Experiment, Result, Scale, Settings
from experiments.language_forms import hybrids
from experiments.training import DEVICE, now
from experiments.variants import config
from pi_attention.models import PiForCausalLM

REPEATS = 3
"""Runs of which medians are taken, after one that compiles the kernels."""


def model_of(settings: Settings) -> PiForCausalLM:
    """With random weights; it has the settings' form."""
    torch.manual_seed(settings["seed"])
    longest = settings["context"] + settings["new"]
    made = config(settings, vocab_size=settings["vocabulary"], max_position_embeddings=longest)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    return PiForCausalLM(made).to(DEVICE, dtype).eval()


@torch.no_grad()
def served(model: PiForCausalLM, prompt: Tensor, chunk: int, new: int) -> dict[str, float]:
    """One prompt [1, context] and `new` tokens after it: seconds, and bytes of the cache before and after these."""
    begun, cache = now(), None
    for part in prompt.split(chunk, dim=1):
        out = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
    token = out.logits[:, -1:].argmax(-1)
    first, held = now() - begun, cache.nbytes
    times = []
    for _ in range(new):
        begun = now()
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        times.append(now() - begun)
    caches = {"cache bytes after the prompt": held, "cache bytes": cache.nbytes}
    return {"first token s": first, "decoded token s": statistics.median(times)} | caches


def measure(settings: Settings, data: Path) -> Result:
    """Medians of the runs; "test" is the median seconds of a decoded token."""
    model = model_of(settings)
    prompt = torch.randint(settings["vocabulary"], (1, settings["context"]), device=DEVICE)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    runs = [served(model, prompt, settings["chunk"], settings["new"]) for _ in range(REPEATS + 1)][1:]
    found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else float("nan")
    count = sum(p.numel() for p in model.parameters())
    both = {"validation": found["decoded token s"], "test": found["decoded token s"]}
    return both | found | {"peak GiB": peak, "parameters": count}


def cells(scale: Scale) -> list[Settings]:
    """Every hybrid and its kinds of layers with 136 M parameters, by the context."""
    if scale == "laptop":
        return []
    sizes = {"hidden": 768, "layers": 12, "heads": 12, "vocabulary": 32768, "keys": 320, "chunk": 4096, "new": 64}
    lengths = [8192, 32768, 131072]
    if scale == "smoke":
        sizes = {"hidden": 32, "layers": 6, "heads": 4, "vocabulary": 99, "keys": 10, "chunk": 16, "new": 2}
        lengths = [40]
    variants = list(dict.fromkeys(cell["variant"] for cell in hybrids(scale)))
    return [{"variant": variant, "context": length, **sizes} for length in lengths for variant in variants]


EXPERIMENT = Experiment(
    name="serving_cost",
    title="Cost of serving a form",
    metric="seconds of a decoded token",
    better="lower",
    cells=cells,
    measure=measure,
    rates=(0.0,),
    seeds=1,
)
