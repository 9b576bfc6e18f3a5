"""Train a π-Transformer language model, from settings to a run folder. Reads from top to bottom.

pi-attention train                                   # the bundled corpus, a few minutes on a laptop
pi-attention train --data book.txt --context 8192
pi-attention train --out runs/pi --resume
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import Subset
from transformers import TrainingArguments, set_seed

from pi_attention import plots
from pi_attention.data.corpus import load_documents
from pi_attention.data.packing import PackedBlocks, hold_out
from pi_attention.data.tokenizers import load_tokenizer
from pi_attention.files import need_folder, write_text
from pi_attention.models import PiConfig, PiForCausalLM
from pi_attention.nn import record_aux
from pi_attention.tasks.generation import generate_text
from pi_attention.training.checkpoints import AtomicTrainer, checkpoint_to_resume, publish, put_aside_after, step_of
from pi_attention.training.config import TrainConfig, load_yaml, save_yaml, to_plain
from pi_attention.training.progress import MetricsFile, ProgressBar, SaveOnInterrupt, read_metrics

SETTINGS = "train.yaml"
MODEL = "model"
PARTIAL_MODEL = ".partial-model"
LAST_SETTING = "zero"
"""Of the file of settings: where it is missing, the file was cut off."""
SUMMARY = "summary.json"
"""The last thing that a run writes."""
ALWAYS_NEW = ("run.out", "run.resume", "run.parallel", "run.zero", "run.patience", "run.checkpoint")
"""Settings that are not of the run, but of the machine and the moment."""


def train(config: TrainConfig, console: Console) -> bool:
    """Train, or resume, and fill the run folder. False when interrupted before the last step.

    A run that was stopped before its first checkpoint resumes at the first step.
    """
    out = config.run.out
    checkpoint = None
    if config.run.resume:
        step, config = config.run.checkpoint, settings_to_resume(config)
        if config.run.parallel:
            raise ValueError(
                f"out={str(out)!r} holds a run of parallel={config.run.parallel!r}: resume it under torchrun, with "
                "--parallel."
            )
        checkpoint = checkpoint_to_resume(out, step)
        if checkpoint is not None and step is not None:
            put_aside_after(out, checkpoint)
        if checkpoint is None and (out / "metrics.jsonl").exists():
            warnings.warn(f"out={str(out)!r} holds no checkpoint: the run begins at its first step.", stacklevel=2)
    else:
        refuse_to_overwrite(config)
    config.check()
    need_folder("out", out)
    trained = checkpoint is not None and step_of(checkpoint) >= config.optimizer.steps
    if trained and (out / SUMMARY).exists():
        console.print(f"{out}/ holds a finished run of {config.optimizer.steps} steps: nothing is left to do.")
        return True

    set_seed(config.run.seed)
    tokenizer = load_tokenizer(config.data.tokenizer)
    training, validation = load_blocks(config, tokenizer)
    model = PiForCausalLM.from_pretrained(checkpoint) if trained else PiForCausalLM(model_config(config, tokenizer))
    if config.optimizer.gradient_checkpointing:
        enable_checkpointing(model)
    out.mkdir(parents=True, exist_ok=True)
    save_yaml(config, out / SETTINGS)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{parameters / 1e6:.1f} M parameters, {len(training.tokens):,} training and {len(validation.tokens):,} "
        f"validation tokens, context {config.data.context}"
    )

    tokens_per_step = config.data.context * config.optimizer.batch_size * config.optimizer.gradient_accumulation
    interrupt = SaveOnInterrupt()
    trainer = AtomicTrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=training,
        eval_dataset=Subset(validation, range(min(config.run.eval_blocks, len(validation)))),
        callbacks=[MetricsFile(out), ProgressBar(tokens_per_step, console), interrupt],
    )
    _keep_only_our_progress(trainer)
    if not trained:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if interrupt.interrupted and trainer.state.global_step < config.optimizer.steps:
        console.print(
            f"Interrupted at step {trainer.state.global_step}, saved. Go on: pi-attention train --out {out} --resume"
        )
        return False

    trainer.save_model(str(out / PARTIAL_MODEL))
    if trainer.is_world_process_zero():
        publish_model(out, tokenizer)
        write_report(config, trainer.model, tokenizer, validation, console)
    return True


def publish_model(out: Path, tokenizer: Any) -> None:
    """Give the saved model its name once it is whole, with its tokenizer."""
    tokenizer.save_pretrained(out / PARTIAL_MODEL)
    publish(out / PARTIAL_MODEL, out / MODEL)


def refuse_to_overwrite(config: TrainConfig) -> None:
    """Raise FileExistsError for a folder that holds a run, ValueError for a checkpoint to go on from without resume."""
    out = config.run.out
    if config.run.checkpoint is not None:
        raise ValueError(f"checkpoint={config.run.checkpoint} is for a run that goes on: add --resume.")
    if (out / SETTINGS).exists():
        raise FileExistsError(
            f"out={str(out)!r} holds a run already: choose another folder, delete it, or use --resume."
        )


def settings_to_resume(given: TrainConfig, *may_change: str) -> TrainConfig:
    """The settings of the run in a folder.

    Args:
        given: its run.out names the folder; every other setting must be the run's, or a default.
        may_change: settings that a run may be resumed with anew, such as "optimizer.batch_size".

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: a setting differs from the run's, or the file of its settings is not whole.
    """
    out = given.run.out
    if not (out / SETTINGS).exists():
        raise FileNotFoundError(f"out={str(out)!r} holds no run to resume: leave out --resume, or give its folder.")
    need_whole_settings(out / SETTINGS)
    config = load_yaml(TrainConfig, out / SETTINGS)
    config.run.out, config.run.resume, config.run.checkpoint = out, False, None
    asked, default, kept = (to_plain(settings) for settings in (given, TrainConfig(), config))
    for part, settings in kept.items():
        for name, value in settings.items():
            other = asked[part][name]
            if f"{part}.{name}" not in ALWAYS_NEW + may_change and other not in (value, default[part][name]):
                raise ValueError(
                    f"{name}={other!r} differs from {value!r} of the run in out={str(out)!r}, and a resumed run keeps "
                    "its settings: leave it out, or train anew in another folder."
                )
    return config


def need_whole_settings(file: Path) -> None:
    """Raise ValueError where a part of a run's settings is gone: a default in its place would be another run."""
    text = file.read_text(encoding="utf-8", errors="replace")
    begun = set(re.findall(r"^(?:  )?(\w+):", text, re.MULTILINE))
    if not begun >= {*to_plain(TrainConfig()), LAST_SETTING} or not text.endswith("\n"):
        raise ValueError(
            f"{file} is incomplete, it was cut off or is empty: write the run's settings into it again, or train anew "
            "in another folder. Nothing was changed."
        )


def load_blocks(config: TrainConfig, tokenizer: Any) -> tuple[PackedBlocks, PackedBlocks]:
    """Training and validation blocks of the run's corpus."""
    documents = load_documents(config.data.data, text_field=config.data.text_field)
    parts = hold_out(documents, config.data.validation_fraction, config.run.seed)
    blocks = []
    for name, part in zip(("training", "validation"), parts, strict=True):
        try:
            blocks.append(PackedBlocks(part, tokenizer, config.data.context))
        except ValueError as error:
            of = f"the {name} part of data={config.data.data!r}, validation_fraction={config.data.validation_fraction}"
            raise ValueError(f"{of}: {error}") from error
    return blocks[0], blocks[1]


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


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The run's settings in transformers' words."""
    o, run = config.optimizer, config.run
    bf16 = o.precision == "bf16" or (
        o.precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )
    return TrainingArguments(
        output_dir=str(run.out),
        max_steps=o.steps,
        per_device_train_batch_size=o.batch_size,
        per_device_eval_batch_size=o.batch_size,
        gradient_accumulation_steps=o.gradient_accumulation,
        learning_rate=o.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=o.warmup_steps,
        weight_decay=o.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=o.max_grad_norm,
        dataloader_pin_memory=torch.cuda.is_available(),
        torch_compile=o.compile,
        bf16=bf16,
        eval_strategy="steps",
        eval_steps=run.eval_every,
        save_strategy="steps",
        save_steps=run.save_every,
        save_total_limit=run.keep_checkpoints,
        logging_steps=run.log_every,
        logging_first_step=True,
        report_to=["tensorboard"],
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=run.seed,
    )


def _keep_only_our_progress(trainer: AtomicTrainer) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


@torch.no_grad()
def write_report(
    config: TrainConfig, model: PiForCausalLM, tokenizer: Any, validation: PackedBlocks, console: Console
) -> None:
    """Pictures of loss, pattern and gate, a sample of text, and a summary of the last metrics."""
    out = config.run.out
    model.eval()
    metrics = read_metrics(out)
    plots.save(plots.loss_curve(metrics), out / "loss.png")
    pattern = model.config.pattern
    plots.save(plots.pattern_picture(pattern, plots.telling_length(pattern, config.data.context)), out / "pattern.png")
    block = validation[0]
    with record_aux(model) as aux:
        model(
            input_ids=block["input_ids"][None].to(model.device),
            segment_ids=block["segment_ids"][None].to(model.device),
            use_cache=False,
        )
    gates = [calls[0].gate[0].float().cpu() for calls in aux.values()]
    plots.save(plots.gate_picture(gates), out / "gate.png")

    prompt = tokenizer.decode(block["input_ids"][:64], skip_special_tokens=True)
    sample = generate_text(model, tokenizer, prompt, max_new_tokens=400, seed=config.run.seed)
    write_text(out / "sample.txt", sample.text)
    last = {key: value for line in metrics for key, value in line.items() if key in ("loss", "eval_loss", "step")}
    write_text(out / SUMMARY, json.dumps(last, indent=2))
    console.print(f"validation loss {last.get('eval_loss', float('nan')):.3f} nats a token; the run is in {out}/")
