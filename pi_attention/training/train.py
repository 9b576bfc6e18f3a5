"""Train a π-Transformer language model, from settings to a run folder. Reads from top to bottom.

pi-attention train                                   # the bundled corpus, a few minutes on a laptop
pi-attention train --data book.txt --context 8192
pi-attention train --out runs/pi --resume
torchrun --nproc-per-node 4 -m pi_attention.cli train --out runs/pi --resume --parallel dp=2,cp=2
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import set_seed

from pi_attention.accelerator import has_bf16
from pi_attention.describe import by_layers, in_words
from pi_attention.models import PiConfig, PiForCausalLM
from pi_attention.paths import need_folder
from pi_attention.pattern import PiPattern
from pi_attention.training.card import write_run_card
from pi_attention.training.checkpoints import checkpoint_to_resume, publish, put_aside_after, step_of
from pi_attention.training.config import TrainConfig, save_yaml
from pi_attention.training.hub import check_hub, push
from pi_attention.training.metrics import METRICS
from pi_attention.training.ranks import device_of_process, joined, layout_of, rank_and_ranks
from pi_attention.training.report import SUMMARY, write_report
from pi_attention.training.resume import SETTINGS, need_same_model, refuse_to_overwrite, settings_to_resume
from pi_attention.training.run import Run
from pi_attention.training.step import Parallel
from pi_attention.training.text import blocks_of, keep_seal, keep_tokenizer, load_parts, need_same_text, run_tokenizer
from pi_attention.training.trackers import check_trackers

MODEL = "model"
PARTIAL_MODEL = ".partial-model"


def train(asked: TrainConfig, console: Console) -> bool:
    """Train, or resume, and fill the run folder; by one process, or by every rank that torchrun started.

    A run that was stopped before its first checkpoint resumes at the first step.

    Returns:
        False when interrupted before the last step.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: a setting, the folder or a checkpoint; before any work.
        RuntimeError: a rank does not answer, and is named.
    """
    config, checkpoint = settings_and_checkpoint(asked)
    out, layout, device = config.run.out, layout_of(config.run.parallel), device_of_process()
    if checkpoint is not None and step_of(checkpoint) >= config.optimizer.steps and (out / SUMMARY).exists():
        if (rank_and_ranks() or (0, 1))[0] == 0:
            console.print(f"{out}/ holds a finished run of {config.optimizer.steps} steps: nothing is left to do.")
        return True
    with joined(layout, config.run.patience, device) as mesh:
        console = console if mesh is None or dist.get_rank() == 0 else Console(quiet=True)
        set_seed(config.run.seed)
        documents, held_out = load_parts(config)
        tokenizer = run_tokenizer(config, documents)
        if checkpoint is not None:
            need_same_model(model_config(config, tokenizer), checkpoint, out / SETTINGS)
        training = blocks_of(config, "training", documents, tokenizer)
        validation = blocks_of(config, "validation", held_out, tokenizer)
        if checkpoint is not None:
            need_same_text(out, config.data.data, training=training, validation=validation)
        model = PiForCausalLM(model_config(config, tokenizer)).to(device).train()
        patterns = model.config.patterns()
        if config.optimizer.gradient_checkpointing:
            enable_checkpointing(model)
        parameters = sum(p.numel() for p in model.parameters())
        bf16, compiled = in_bf16(config.optimizer.precision, device), config.optimizer.compile
        parallel = Parallel(model, mesh, zero=config.run.zero, bf16=bf16, compiled=compiled)
        if mesh is not None:
            dist.barrier()  # every rank has seen that the folder holds no run, or which checkpoints
        if parallel.is_first:
            if checkpoint is None:
                keep_seal(config, training=training, validation=validation)
            claim_folder(config, tokenizer, checkpoint if asked.run.checkpoint is not None else None)
        for line in facts(parameters, patterns, config.data.context, len(training.tokens), len(validation.tokens)):
            console.print(line, soft_wrap=True)
        step = Run(config, parallel, training, validation, console).go(checkpoint)
        if step < config.optimizer.steps:
            console.print(
                f"Interrupted at step {step}, saved. Go on: pi-attention train --out {out} --resume", soft_wrap=True
            )
            return False
        whole = model if mesh is None else whole_model(model, parallel, model_config(config, tokenizer))
    if whole is not None:
        publish_model(out, whole, tokenizer)
        summary = write_report(config, whole.to(device), tokenizer, validation, console)
        write_run_card(out / MODEL, whole.config, config, summary)
        if config.run.push_to_hub:
            console.print(f"The model is at {push(out / MODEL, config.run.push_to_hub)}")
    return True


def facts(parameters: int, patterns: list[PiPattern], context: int, training: int, validation: int) -> list[str]:
    """The size of a run, and what its layers see, in lines."""
    lines = [
        f"{parameters:,} parameters, {training:,} training and {validation:,} validation tokens, context {context}"
    ]
    alike = by_layers(patterns)
    for pattern, layers in alike.items():
        which = layers if len(alike) > 1 else "each layer"
        lines.append(f"{which}: a token sees {in_words(pattern, context)}")
    return lines


def settings_and_checkpoint(asked: TrainConfig) -> tuple[TrainConfig, Path | None]:
    """The settings of a new or a resumed run, and the checkpoint that it goes on from, all of it checked."""
    out, checkpoint = asked.run.out, None
    layout = layout_of(asked.run.parallel)
    if layout.ranks > 1:
        asked.run.parallel = str(layout)
    if asked.run.resume:
        config = settings_to_resume(asked)
        checkpoint = checkpoint_to_resume(out, asked.run.checkpoint, *(rank_and_ranks() or (0, 1)))
        if checkpoint is None and (out / METRICS).exists():
            warnings.warn(f"out={str(out)!r} holds no checkpoint: the run begins at its first step.", stacklevel=3)
    else:
        config = asked
        refuse_to_overwrite(config)
        config.check_unused()
    config.check()
    if config.optimizer.compile and rank_and_ranks() is not None:
        raise ValueError("compile=True is not supported with parallel: leave one of them out.")
    check_trackers(config.run.report_to)
    if config.run.push_to_hub:
        check_hub(config.run.push_to_hub)
    need_folder("out", out)
    return config, checkpoint


def claim_folder(config: TrainConfig, tokenizer: Any, chosen: Path | None) -> None:
    """Write the run's own tokenizer and its settings into its folder; checkpoints after the chosen one go aside."""
    out = config.run.out
    out.mkdir(parents=True, exist_ok=True)
    keep_tokenizer(config, tokenizer)
    save_yaml(config, out / SETTINGS)
    if chosen is not None:
        put_aside_after(out, chosen)


def model_config(config: TrainConfig, tokenizer: Any) -> PiConfig:
    """The Hugging Face configuration of the run's model."""
    m = config.model
    return PiConfig(
        vocab_size=len(tokenizer),
        hidden_size=m.hidden_size,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads,
        **m.pattern().to_dict(),
        layer_patterns=list(m.layer_patterns),
        gate=m.gate,
        fusion=m.fusion,
        gate_features=m.gate_features,
        qk_norm=m.qk_norm,
        tie_word_embeddings=m.tie_word_embeddings,
        max_position_embeddings=config.data.context,
        loss_slice=config.optimizer.loss_slice,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def enable_checkpointing(model: PiForCausalLM) -> None:
    """Recompute activations in the backward pass (renamed in transformers 5.2x)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def in_bf16(precision: str, device: torch.device) -> bool:
    """Whether a run computes in bf16: where it is asked for, or by "auto" on a GPU that has it."""
    return precision == "bf16" or (precision == "auto" and has_bf16(device))


def whole_model(model: PiForCausalLM, parallel: Parallel, config: PiConfig) -> PiForCausalLM | None:
    """The trained model in one piece, on the first rank; None on the others. Called by every rank."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if not parallel.is_first:
        return None
    whole = PiForCausalLM(config)
    whole.load_state_dict(weights)
    return whole


def publish_model(out: Path, model: PiForCausalLM, tokenizer: Any) -> None:
    """Save a model with its tokenizer; it has its name once it is whole."""
    model.save_pretrained(out / PARTIAL_MODEL)
    tokenizer.save_pretrained(out / PARTIAL_MODEL)
    publish(out / PARTIAL_MODEL, out / MODEL)
