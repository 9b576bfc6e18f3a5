"""Train over many ranks under torchrun: data, tensor and context parallel, FSDP2, checkpoints that any layout loads.

torchrun --nproc-per-node 4 -m pi_attention.cli train --parallel dp=2,cp=2
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import get_cosine_schedule_with_warmup, set_seed

from pi_attention.data.packing import PackedBlocks
from pi_attention.data.tokenizers import load_tokenizer
from pi_attention.distributed.layout import Layout, Parallel, of_rank
from pi_attention.files import need_folder
from pi_attention.models import PiForCausalLM
from pi_attention.training.checkpoints import (
    PARTIAL,
    checkpoint_to_resume,
    checkpoints_of,
    last_checkpoint,
    put_aside_after,
    seal,
    step_of,
)
from pi_attention.training.config import TrainConfig, save_yaml
from pi_attention.training.progress import append_metrics, drop_metrics_after
from pi_attention.training.train import (
    PARTIAL_MODEL,
    SETTINGS,
    enable_checkpointing,
    load_blocks,
    model_config,
    publish_model,
    refuse_to_overwrite,
    settings_to_resume,
    write_report,
)

SHARDED = "sharded"
ANSWER = 10
"""Seconds that a rank has to say that it lives, once an exchange has failed."""


@lru_cache(maxsize=2)
def _order(blocks: int, seed: int) -> list[int]:
    return torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()


def blocks_of_step(step: int, count: int, blocks: int, seed: int) -> list[int]:
    """The blocks of an optimizer step: each epoch is a new permutation, the same for every layout."""
    numbers = range(step * count, (step + 1) * count)
    return [_order(blocks, seed + number // blocks)[number % blocks] for number in numbers]


def clip_gradients(model: nn.Module, most: float) -> None:
    """Scale all gradients so that their norm over all ranks is at most `most`."""
    squares: Tensor | None = None
    for parameter in model.parameters():
        grad = parameter.grad
        if grad is not None:
            norm = torch.linalg.vector_norm(grad)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            squares = norm.square() if squares is None else squares + norm.square()
    if squares is None:
        return
    factor = (most / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def save(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """Write a checkpoint of all ranks; it has its name only when it is complete."""
    staging = run / PARTIAL
    if dist.get_rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    state_dict_saver.save({"model": weights, "optimizer": moments}, checkpoint_id=staging)
    if dist.get_rank() == 0:
        seal(staging, checksums=False)  # one rank would have to read what all of them wrote
        final = run / f"{SHARDED}-{step}"
        shutil.rmtree(final, ignore_errors=True)
        staging.replace(final)
        for old in checkpoints_of(run, SHARDED)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint of any layout into this one; the step it was made after."""
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    state_dict_loader.load(state, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return step_of(checkpoint)


def start(patience: int) -> torch.device:
    """Join the process group that torchrun describes; this rank's device.

    Args:
        patience: seconds that an exchange may take.

    Raises:
        ValueError: the process was not started by torchrun.
    """
    if "RANK" not in os.environ:
        raise ValueError(
            "parallel needs several processes: torchrun --nproc-per-node N -m pi_attention.cli train --parallel …"
        )
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=timedelta(seconds=patience))
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timedelta(seconds=patience))
    return device


@contextmanager
def naming_the_missing() -> Iterator[None]:
    """Turn a failed exchange into an error that names the ranks which do not answer.

    Raises:
        RuntimeError: an exchange failed, or took longer than the process group's timeout.
    """
    watch = dist.new_group(backend="gloo", timeout=timedelta(seconds=ANSWER))
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        try:
            dist.monitored_barrier(watch, timedelta(seconds=ANSWER), wait_all_ranks=True)
        except RuntimeError as missing:
            raise RuntimeError(f"rank {dist.get_rank()} failed, and not all ranks answer: {missing}") from error
        raise


def train_over_ranks(config: TrainConfig, console: Console) -> None:
    """Train, or resume at any layout, and fill the run folder as `train` does; called by every rank of torchrun."""
    out = config.run.out
    if config.run.resume:
        layout_settings = ("optimizer.batch_size", "optimizer.gradient_accumulation")
        asked, config = config, settings_to_resume(config, *layout_settings)
        if last_checkpoint(out) is not None:
            raise ValueError(f"out={str(out)!r} holds a run of one process: resume it without --parallel and torchrun.")
        before = _blocks_a_step(config)
        config.run.parallel, config.run.zero, config.run.patience = (
            asked.run.parallel,
            asked.run.zero,
            asked.run.patience,
        )
        config.optimizer.batch_size = asked.optimizer.batch_size
        config.optimizer.gradient_accumulation = asked.optimizer.gradient_accumulation
        if _blocks_a_step(config) != before:
            raise ValueError(
                f"a step of the run has {before} blocks, but batch_size · gradient_accumulation · dp, with "
                f"parallel={config.run.parallel!r}, is {_blocks_a_step(config)}: choose them so that it is {before}."
            )
        checkpoint = checkpoint_to_resume(out, asked.run.checkpoint, SHARDED)
    else:
        refuse_to_overwrite(config)
        asked, checkpoint = config, None
    config.check()
    need_folder("out", out)
    layout = Layout.parse(config.run.parallel)
    if config.optimizer.compile:
        raise ValueError("compile=True is not supported with parallel: leave one of them out.")
    device = start(config.run.patience)
    with naming_the_missing():
        mesh = layout.mesh(device.type)
        first = dist.get_rank() == 0
        console = console if first else Console(quiet=True)
        set_seed(config.run.seed)
        tokenizer = load_tokenizer(config.data.tokenizer)
        training, validation = load_blocks(config, tokenizer)
        model = PiForCausalLM(model_config(config, tokenizer))
        if config.optimizer.gradient_checkpointing:
            enable_checkpointing(model)
        bf16 = device.type == "cuda" and config.optimizer.precision != "fp32"
        parallel = Parallel(model.to(device).train(), mesh, zero=config.run.zero, bf16=bf16)
        dist.barrier()  # every rank has seen that the folder holds no run
        if first:
            out.mkdir(parents=True, exist_ok=True)
            save_yaml(config, out / SETTINGS)
            if checkpoint is not None and asked.run.checkpoint is not None:
                put_aside_after(out, checkpoint, SHARDED)
        weights = _steps(config, parallel, training, validation, console, checkpoint)
        dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()
    if first:
        whole = PiForCausalLM(model_config(config, tokenizer))
        whole.load_state_dict(weights)
        whole.save_pretrained(out / PARTIAL_MODEL)
        publish_model(out, tokenizer)
        write_report(config, whole.to(device), tokenizer, validation, console)


def _blocks_a_step(config: TrainConfig) -> int:
    o = config.optimizer
    return o.batch_size * o.gradient_accumulation * Layout.parse(config.run.parallel).dp


def _steps(
    config: TrainConfig,
    parallel: Parallel,
    training: PackedBlocks,
    validation: PackedBlocks,
    console: Console,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """All steps from the checkpoint on; the whole weights on the first rank, nothing on the others."""
    o, run = config.optimizer, config.run
    model, ranks = parallel.model, parallel.mesh["dp"].size()
    device = next(model.parameters()).device
    groups: dict[bool, list[Tensor]] = {True: [], False: []}  # as the Trainer, decay neither norms nor biases
    for name, parameter in model.named_parameters():
        groups["norm" not in name and "bias" not in name].append(parameter)
    decays = {True: o.weight_decay, False: 0.0}
    optimizer = torch.optim.AdamW(
        [{"params": members, "weight_decay": decays[decayed]} for decayed, members in groups.items() if members],
        lr=o.learning_rate,
        betas=(0.9, 0.95),
        foreach=False,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, o.warmup_steps, o.steps)
    first = load(checkpoint, model, optimizer) if checkpoint is not None else 0
    if first:  # a rate is a function of the step alone
        schedule.last_epoch = first - 1
        schedule.step()
    count = _blocks_a_step(config)
    if parallel.is_first:
        drop_metrics_after(run.out, first)

    def block_of(blocks: PackedBlocks, index: int) -> dict[str, Tensor]:
        return {name: value[None].to(device) for name, value in blocks[index].items()}

    def report(step: int, **values: float) -> None:
        if parallel.is_first:
            append_metrics(run.out, step, values)
            console.print(f"step {step}/{o.steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))

    @torch.no_grad()
    def validate() -> float:
        held_out = range(min(run.eval_blocks, len(validation)))
        losses = [parallel.loss(block_of(validation, i), blocks=len(held_out)) for i in held_out]
        return parallel.mean(torch.stack(losses).sum()) / ranks  # every group computes all blocks

    for step in range(first, o.steps):
        losses: list[Tensor] = []
        chosen = blocks_of_step(step, count, len(training), run.seed)
        mine = of_rank(chosen, parallel.mesh["dp"].get_local_rank(), ranks)
        for index in mine:
            loss = parallel.loss(block_of(training, index), blocks=count)
            parallel.backward(loss, last=len(losses) + 1 == len(mine))
            losses.append(loss.detach())
        clip_gradients(model, o.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean, done = parallel.mean(torch.stack(losses).sum()), step + 1
        if step == first or done % run.log_every == 0:
            report(done, loss=mean)
        if done % run.eval_every == 0 or done == o.steps:
            report(done, eval_loss=validate())
        if done % run.save_every == 0 or done == o.steps:
            save(run.out, done, model, optimizer, run.keep_checkpoints)
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
