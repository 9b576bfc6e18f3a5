"""What a training step of 10 B parameters costs: FLOPs counted, tokens a second, peak memory.

Weights and arithmetic in bf16, activations recomputed in the backward pass, Adafactor (arXiv 1804.04235), whose
state is small; the logits of a long sequence exist for a slice of tokens at a time.
"""

from __future__ import annotations

import gc
import statistics
from pathlib import Path

import torch
from torch import Tensor

from experiments.experiment import Experiment, Result, Scale, Settings
from experiments.training import DEVICE, now
from experiments.variants import config
from pi_attention.accounting import model_flops
from pi_attention.models import PiForCausalLM
from pi_attention.training.train import enable_checkpointing

SLICE = 4096
VARIANTS = ("dense", "ring-local, same window", "ring-local, same keys", "pi", "pi, no gate")


def measure(settings: Settings, data: Path) -> Result:
    """Real training steps on one sequence; "test" is the median seconds of a step after the first."""
    torch.manual_seed(settings["seed"])
    sizes = {"vocab_size": settings["vocabulary"], "num_key_value_heads": settings["kv heads"]}
    made = config(settings, **sizes, loss_slice=SLICE)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = PiForCausalLM(made)
    finally:
        torch.set_default_dtype(before)
    enable_checkpointing(model)
    model.train()
    # the update of each weight as soon as its gradient is there, so that the gradients never exist together
    optimizers = {p: torch.optim.Adafactor([p], lr=settings["rate"]) for p in model.parameters()}

    def update(parameter: Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(update) for parameter in model.parameters()]
    ids = torch.randint(settings["vocabulary"], (1, settings["context"]), device=DEVICE)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(settings["steps"]):
        begun = now()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        seconds.append(now() - begun)
    step = statistics.median(seconds[1:])
    count = sum(p.numel() for p in model.parameters())
    for handle in handles:  # their closures hold the weights in a cycle
        handle.remove()
    optimizers.clear()
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else float("nan")
    flops = sum(model_flops(made.patterns(), settings["context"], made.sizes(), backward=True).values())
    del model
    gc.collect()
    return {
        "validation": step,
        "test": step,
        "tokens/s": settings["context"] / step,
        "forward + backward TFLOP of a step, without recomputation": flops / 1e12,
        "peak GiB": peak,
        "parameters": count,
        "losses": losses,
    }


def cells(scale: Scale) -> list[Settings]:
    """A model of 10 B parameters at several contexts."""
    if scale == "laptop":
        return []
    pattern = {"window": 256, "period": 256, "skips": 16}
    sizes = {"hidden": 4096, "layers": 56, "heads": 32, "kv heads": 8, "vocabulary": 32000, "steps": 3}
    lengths = [8192, 32768, 131072]
    if scale == "smoke":
        pattern = {"window": 16, "period": 16, "skips": 4}
        sizes = {"hidden": 32, "layers": 2, "heads": 2, "kv heads": 1, "vocabulary": 100, "steps": 2}
        lengths = [128]
    return [
        {"variant": variant, "context": context, **pattern, **sizes, "steps": 2 if context > 32768 else sizes["steps"]}
        for context in lengths
        for variant in VARIANTS
    ]


EXPERIMENT = Experiment(
    name="cost",
    title="Cost of a training step",
    metric="seconds a step",
    better="lower",
    cells=cells,
    measure=measure,
    rates=(1e-4,),
    seeds=1,
)
