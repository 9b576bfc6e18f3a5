"""What a pretrained model loses when its dense attention becomes a pattern, and what a short fine-tune gives back.

    python -m benchmarks.conversion MODEL_DIR --text FILE [--train-text FILE] [--lengths 2048 8192] [--steps 24]

Perplexity a token on chunks of a long text, without training, for patterns of one key budget; then after fine-tuning
the gates, adapters, or all weights at each length on another text. Writes results/conversion-<name>.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.intervals import interval
from benchmarks.timing import write
from pi_attention import PiPattern
from pi_attention.convert import convert
from pi_attention.data.packing import PackedBlocks
from pi_attention.training.finetune import LEARNING_RATES, Part, finetune

BUDGET = 272
SLICE = 2048
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINKS = 4
SKIPS = 16


def computed_on() -> str:
    """The device, and in which precision."""
    return torch.cuda.get_device_name() + ", bf16 products" if DEVICE == "cuda" else "CPU, fp32"


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
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    return model if pattern is None else convert(model, pattern, gate=gate)


def begun(chunks: list[Tensor], bos: int) -> list[Tensor]:
    """Chunks that begin with a token, as some models must; the last of each makes room."""
    return [torch.cat([torch.tensor([bos]), chunk[:-1]]) for chunk in chunks]


@torch.no_grad()
def losses(model: Any, chunks: list[Tensor]) -> list[float]:
    """Mean loss of each chunk [length] of tokens; the logits of a large vocabulary exist for SLICE tokens at a time."""
    model.eval()
    found = []
    for chunk in chunks:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            kept = model(chunk[None].to(DEVICE), use_cache=False, output_hidden_states=True, logits_to_keep=1)
            hidden = kept.hidden_states[-1][0, :-1]
            parts = zip(hidden.split(SLICE), chunk[1:].to(DEVICE).split(SLICE), strict=True)
            head = model.get_output_embeddings()
            losses = [F.cross_entropy(head(part).float(), target, reduction="sum") for part, target in parts]
        found.append(float(sum(losses)) / len(hidden))
    return found


def summary(found: list[float], dense: list[float]) -> dict[str, Any]:
    """Perplexity, and its ratio to the dense model's on the same chunks, with a 95 % interval (Student's t, paired)."""
    gaps = [a - b for a, b in zip(found, dense, strict=True)]
    mean, spread = interval(gaps)
    return {
        "perplexity": math.exp(statistics.fmean(found)),
        "over dense": math.exp(mean),
        "interval": [math.exp(mean - spread), math.exp(mean + spread)],
        "chunks": len(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--tokens", type=int, default=32768, help="evaluated at each length")
    parser.add_argument("--train-text", type=Path, help="text of the fine-tunes; the rest of --text when left out")
    parser.add_argument("--steps", type=int, default=24, help="of fine-tuning, one chunk each; 0 for none")
    parser.add_argument("--finetune-lengths", type=int, nargs="*", help="lengths to fine-tune at; all when left out")
    parser.add_argument("--parts", nargs="+", default=["gates", "lora", "all"], help="what the fine-tunes train")
    parser.add_argument("--bos", action="store_true", help="each chunk begins with the tokenizer's BOS, as Gemma needs")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text()
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    training = options.train_text.read_text() if options.train_text else tokenizer.decode(tokens[options.tokens :])
    rows: list[dict[str, Any]] = []
    head = {
        "model": options.model.name,
        "text": options.text.name,
        "device": computed_on(),
        "budget": BUDGET,
        "rows": rows,
    }

    def add(row: dict[str, Any]) -> None:
        print(row, flush=True)
        rows.append(row)
        write(f"conversion-{options.model.name}", head)

    for length in options.lengths:
        chunks = list(tokens[: options.tokens].split(length))
        if options.bos:
            chunks = begun(chunks, tokenizer.bos_token_id)
        dense: list[float] = []
        for name, pattern in patterns(length).items():
            found = losses(model_of(options.model, pattern), chunks)
            dense = dense or found
            add({"S": length, "variant": name, "trained": "nothing", **summary(found, dense)})
        if not options.steps or length not in (options.finetune_lengths or options.lengths):
            continue
        blocks = PackedBlocks([training], tokenizer, length)
        parts: list[tuple[str, Part]] = [("window + sinks + skips", part) for part in options.parts]
        parts += [
            (control, part) for part in options.parts if part != "gates" for control in ("window + sinks", "dense")
        ]
        for name, part in parts:
            pattern = patterns(length)[name] or PiPattern(length, 1, 0)
            model = model_of(options.model, pattern, gate=pattern.skips != 0)
            with tempfile.TemporaryDirectory() as folder:
                rate = LEARNING_RATES[part]
                finetune(model, blocks, steps=options.steps, part=part, learning_rate=rate, out=Path(folder))
            row = {"S": length, "variant": name, "trained": part, "steps": options.steps}
            add(row | summary(losses(model, chunks), dense))


if __name__ == "__main__":
    main()
