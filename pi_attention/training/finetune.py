"""A short fine-tune of a converted model: its gates alone, or all of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Trainer, TrainingArguments

from pi_attention.data.packing import PackedBlocks

Part = Literal["gates", "all"]


def finetune(
    model: Any, blocks: PackedBlocks, *, steps: int, part: Part, learning_rate: float, out: Path, seed: int = 0
) -> None:
    """Train a converted model in place by transformers.Trainer, one block a step.

    Args:
        model: from `pi_attention.convert.convert`.
        blocks: of the text.
        steps: optimizer steps.
        part: "gates" trains the fusion gates and leaves the pretrained weights; "all" trains everything.
        learning_rate: peak; it decays to zero along a cosine.
        out: folder for the Trainer's files.
        seed: of the order of the blocks.

    Raises:
        ValueError: part="gates" and the model has none.
    """
    chosen = {name for name, _ in model.named_parameters() if part == "all" or "pi_gate" in name}
    if not chosen:
        raise ValueError('part="gates", but the model has no gate: convert with gate=True, or train part="all".')
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        save_strategy="no",
        logging_steps=max(1, steps // 20),
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=seed,
    )
    Trainer(model=model, args=arguments, train_dataset=blocks).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name])
