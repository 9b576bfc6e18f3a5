"""What a pretrained model loses when its dense attention becomes a pattern, and what a short fine-tune gives back.

    python -m benchmarks.conversion MODEL_DIR --text FILE [--lengths 2048 8192] [--steps 24]

Perplexity a token on chunks of a long text, without training, for patterns of one key budget; then after fine-tuning
the gates alone, or all weights, at the shortest length on another part of the text. Writes
results/conversion-<name>.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.timing import write
from pi_attention import PiPattern
from pi_attention.convert import convert

BUDGET = 272
SINKS = 4
SKIPS = 16
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 7: 2.365, 11: 2.201, 15: 2.131, 23: 2.069, 31: 2.040}
"""97.5 % by degrees of freedom."""


def patterns(length: int) -> dict[str, PiPattern | None]:
    """Variants of the same number of keys a query; the skips reach back over the whole context."""
    period = length // SKIPS
    return {
        "dense": None,
        "window": PiPattern(BUDGET, 1, 0),
        "window + sinks": PiPattern(BUDGET - SINKS, 1, 0, sinks=SINKS),
        "window + skips": PiPattern(BUDGET - SKIPS, period, SKIPS),
        "window + sinks + skips": PiPattern(BUDGET - SINKS - SKIPS, period, SKIPS, sinks=SINKS),
    }


def model_of(folder: Path, pattern: PiPattern | None, gate: bool = False) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model if pattern is None else convert(model, pattern, gate=gate)


@torch.no_grad()
def losses(model: Any, chunks: list[Tensor]) -> list[float]:
    """Mean loss of each chunk [length] of tokens."""
    model.eval()
    found = []
    for chunk in chunks:
        logits = model(chunk[None], use_cache=False).logits[0, :-1]
        found.append(float(F.cross_entropy(logits.float(), chunk[1:])))
    return found


def summary(found: list[float], dense: list[float]) -> dict[str, Any]:
    """Perplexity, and its ratio to the dense model's on the same chunks, with a 95 % interval (Student's t, paired)."""
    gaps = [a - b for a, b in zip(found, dense, strict=True)]
    quantile = T_QUANTILES.get(len(gaps) - 1, 1.96)
    spread = quantile * statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    mean = statistics.fmean(gaps)
    return {
        "perplexity": math.exp(statistics.fmean(found)),
        "over dense": math.exp(mean),
        "interval": [math.exp(mean - spread), math.exp(mean + spread)],
        "chunks": len(found),
    }


def fine_tune(model: Any, chunks: list[Tensor], which: str) -> float:
    """One pass over the chunks; the seconds it took."""
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(which == "all" or "pi_gate" in name)
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-5 if which == "all" else 3e-3, weight_decay=0.0)
    begun = time.perf_counter()
    for chunk in chunks:
        model(chunk[None], labels=chunk[None], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--tokens", type=int, default=32768, help="evaluated at each length")
    parser.add_argument("--steps", type=int, default=24, help="of fine-tuning, one chunk each; 0 for none")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = tokenizer(options.text.read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    rows: list[dict[str, Any]] = []
    head = {"model": options.model.name, "text": options.text.name, "budget": BUDGET, "rows": rows}

    def add(row: dict[str, Any]) -> None:
        print(row, flush=True)
        rows.append(row)
        write(f"conversion-{options.model.name}", head)

    first = min(options.lengths)
    for length in options.lengths:
        chunks = list(tokens[: options.tokens].split(length))
        dense: list[float] = []
        for name, pattern in patterns(length).items():
            begun = time.perf_counter()
            found = losses(model_of(options.model, pattern), chunks)
            dense = dense or found
            add({"S": length, "variant": name, "trained": "nothing", **summary(found, dense)})
            print(f"{time.perf_counter() - begun:.0f} s", flush=True)
        if length != first or not options.steps:
            continue
        begin = options.tokens
        training = list(tokens[begin : begin + options.steps * length].split(length))
        for name, which in (
            ("window + sinks + skips", "gates"),
            ("window + sinks + skips", "all"),
            ("window + sinks", "all"),
        ):
            model = model_of(options.model, patterns(length)[name], gate=True)
            seconds = fine_tune(model, training, which)
            row = {"S": length, "variant": name, "trained": which, "steps": len(training), "seconds": seconds}
            add(row | summary(losses(model, chunks), dense))


if __name__ == "__main__":
    main()
