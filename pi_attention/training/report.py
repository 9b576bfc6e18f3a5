"""What a finished run leaves for the eye: pictures of loss, pattern and gate, a sample of text, a summary."""

from __future__ import annotations

import json
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pi_attention import plots
from pi_attention.data.packing import PackedBlocks
from pi_attention.data.tokenizers import beginning
from pi_attention.files import write_text
from pi_attention.models import PiForCausalLM
from pi_attention.nn import record_aux
from pi_attention.tasks.generation import generate_text
from pi_attention.training.config import TrainConfig
from pi_attention.training.metrics import read_metrics

SUMMARY = "summary.json"
"""The last thing that a run writes."""


def _sample(model: PiForCausalLM, tokenizer: Any, block: Tensor, seed: int) -> str:
    """The beginning of a block [context] and how the model goes on, within the context that it was trained for."""
    context = len(block)
    prompt = tokenizer.decode(block[: min(64, -(-context // 2))], skip_special_tokens=True).rstrip("\ufffd") or "\n"
    read = len(beginning(tokenizer)) + len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return generate_text(model, tokenizer, prompt, max_new_tokens=max(1, min(400, context - read)), seed=seed).text


@torch.no_grad()
def write_report(
    config: TrainConfig, model: PiForCausalLM, tokenizer: Any, validation: PackedBlocks, console: Console
) -> dict[str, Any]:
    """Write pictures, a sample of text, and a summary of the last metrics, which it returns."""
    out = config.run.out
    model.eval()
    metrics = read_metrics(out)
    plots.save(plots.loss_curve(metrics), out / "loss.png")
    patterns = model.config.patterns()
    plots.save(plots.stack_picture(patterns, config.data.context), out / "pattern.png")
    block = validation[0]
    with record_aux(model) as aux:
        model(
            input_ids=block["input_ids"][None].to(model.device),
            segment_ids=block["segment_ids"][None].to(model.device),
            use_cache=False,
        )
    records = zip(aux.values(), patterns, strict=True)
    gates = [calls[0].gate[0].float().cpu() for calls, pattern in records if pattern.skips != 0]
    if gates:
        plots.save(plots.gate_picture(gates), out / "gate.png")

    write_text(out / "sample.txt", _sample(model, tokenizer, block["input_ids"], config.run.seed))
    last = {key: value for line in metrics for key, value in line.items() if key in ("loss", "eval_loss", "step")}
    write_text(out / SUMMARY, json.dumps(last, indent=2))
    console.print(f"validation loss {last.get('eval_loss', float('nan')):.3f} nats a token; the run is in {out}/")
    return last
