"""A short fine-tune of a converted model: its gates alone, with low-rank adapters (LoRA), or all of its weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from pi_attention.accelerator import best_device, has_bf16
from pi_attention.data.packing import PackedBlocks
from pi_attention.training.checkpoints import contents, seal
from pi_attention.training.interrupts import Interrupts
from pi_attention.training.state import tied_weights

Part = Literal["gates", "lora", "all"]

LEARNING_RATES: dict[Part, float] = {"gates": 3e-3, "lora": 2e-4, "all": 2e-5}
"""Peak learning rates that serve a short fine-tune."""


class _Lines(TrainerCallback):
    """Tells the mean loss since the last line, where the Trainer would print a dict."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.tell(f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.3f}")


class _Trainer(Trainer):
    """A Trainer that does not miss tied weights in a checkpoint, which holds them once."""

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = tied_weights(self.model)
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)


class _Checkpoints(TrainerCallback):
    """Seals each checkpoint, and ends the training after the step in which Ctrl-C came, with a checkpoint."""

    def __init__(self, interrupts: Interrupts) -> None:
        self.interrupts = interrupts

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupts.noted:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        seal(folder, contents(folder))


def need_peft() -> None:
    """Raise ValueError where PEFT, which makes the adapters of part="lora", is not installed."""
    if find_spec("peft") is None:
        raise ValueError('part="lora" needs PEFT: pip install peft, or train part="gates" or "all".')


def projections(model: nn.Module) -> list[str]:
    """The names of the linear maps in the attention of every layer, gates aside.

    Raises:
        ValueError: there are none.
    """
    attention = {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "layer_idx", None) is not None and "Attention" in type(module).__name__
    }
    found = [
        f"{name}.{inner}"
        for name, module in attention.items()
        for inner, part in module.named_modules()
        if isinstance(part, nn.Linear | Conv1D) and "pi_gate" not in inner
    ]
    if not found:
        raise ValueError('part="lora" finds no projections in the attention of this model: train part="all".')
    return found


def _adapted(model: Any) -> Any:
    """The model with adapters of rank 16 on the attention projections (arXiv 2106.09685), and its gates trainable."""
    need_peft()
    from peft import LoraConfig, get_peft_model

    gates = any("pi_gate" in name for name, _ in model.named_parameters())
    settings = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=projections(model),
        modules_to_save=["pi_gate"] if gates else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def finetune(
    model: Any,
    blocks: PackedBlocks,
    *,
    steps: int,
    part: Part,
    learning_rate: float,
    out: Path,
    seed: int = 0,
    save_every: int | None = None,
    checkpoint: Path | None = None,
    tell: Callable[[str], None] = print,
) -> int:
    """Train a converted model in place by transformers.Trainer, one block a step.

    Args:
        model: from `pi_attention.convert.convert`.
        blocks: of the text.
        steps: optimizer steps.
        part: "gates" trains the fusion gates and leaves the pretrained weights; "lora" trains the gates and adapters
            on the attention projections, which are merged into the weights at the end; "all" trains everything.
        learning_rate: peak; it decays to zero along a cosine.
        out: folder for the Trainer's files.
        seed: of the order of the blocks.
        save_every: steps between two checkpoints in `out`; Ctrl-C saves one as well, and ends the training. None keeps
            none.
        checkpoint: one of those, to go on from: the result is that of a training that was not interrupted.
        tell: is given a line with step and loss, about twenty times.

    Returns:
        The step after which it ended.

    Raises:
        ValueError: part="gates" and the model has none, or part="lora" without PEFT, or without projections.
    """
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trained = _adapted(model) if part == "lora" else model
    if part != "lora":
        chosen = {name for name in before if part == "all" or "pi_gate" in name}
        if not chosen:
            raise ValueError('part="gates", but the model has no gate: convert with gate=True, or train part="all".')
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
    try:
        arguments = TrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            bf16=has_bf16(best_device()),
            dataloader_pin_memory=best_device().type != "cpu",
            save_strategy="no" if save_every is None else "steps",
            save_steps=save_every or steps,
            save_total_limit=2,
            logging_steps=max(1, steps // 20),
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=seed,
        )
        trainer = _Trainer(model=trained, args=arguments, train_dataset=blocks, callbacks=[_Lines(tell)])
        trainer.remove_callback(PrinterCallback)
        with nullcontext() if save_every is None else Interrupts() as interrupts:
            if interrupts is not None:
                trainer.add_callback(_Checkpoints(interrupts))
            # from a checkpoint of the last step, the Trainer makes one more, at a rate of 0
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if part == "lora":
            trained.merge_and_unload()
    except BaseException:
        if part == "lora":
            trained.unload()  # the adapters, half trained
        raise
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
    return int(trainer.state.global_step)
