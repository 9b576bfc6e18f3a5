"""A training step, forward, backward and AdamW, of a layout: its time, tokens/s and memory, and the bill of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.multigpu.clock import measured, silenced, slowest
from benchmarks.multigpu.operator import pattern_of
from benchmarks.multigpu.rows import Row
from benchmarks.multigpu.ways import RING, hollow_ring, spread, tokens_of
from benchmarks.sizes import config_of
from pi_attention.accounting import Sizes
from pi_attention.bill import MODELS, bill, parameters
from pi_attention.distributed import Layout
from pi_attention.models import PiForCausalLM
from pi_attention.training.step import Parallel
from pi_attention.training.train import enable_checkpointing

TOY = Sizes(64, 192, 2, 8, 8, 8, 256, 64, 32)
BUDGET = 2.0
"""Seconds of a measurement's steps, about."""


def sizes_of(settings: Row) -> Sizes:
    """The model's shape; `layers` replaces the number of its layers."""
    sizes = TOY if settings["model"] == "toy" else MODELS[settings["model"]]
    return sizes if settings.get("layers") is None else replace(sizes, num_hidden_layers=settings["layers"])


def predicted(settings: Row) -> int:
    """Bytes of a rank by the bill."""
    layout, sizes = Layout.parse(settings["layout"]), sizes_of(settings)
    return bill(
        sizes,
        pattern_of(settings["pattern"], sizes.num_attention_heads),
        settings["S"],
        layout.cp,
        settings["way"],
        settings["loss slice"],
        dp=layout.dp,
        tp=layout.tp,
        zero=settings["zero"],
    ).bytes


def model_of(settings: Row, mesh: Any, device: torch.device) -> Parallel:
    """The model with weights drawn shard by shard, so that no rank ever holds the whole of it."""
    sizes = sizes_of(settings)
    config = config_of(
        sizes,
        pattern_of(settings["pattern"], sizes.num_attention_heads),
        layer_patterns=["dense"] if settings["way"] == RING else None,
        loss_slice=settings["loss slice"],
    )
    with torch.device("meta"):
        model = PiForCausalLM(config).train()
    enable_checkpointing(model)
    parallel = Parallel(model, mesh, zero=settings["zero"], bf16=device.type == "cuda")
    model.to_empty(device=device)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)  # its frequencies are no weights
    for parameter in model.parameters():
        local = parameter.to_local()
        torch.nn.init.normal_(local, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(local)
    return parallel


def optimizer_of(model: torch.nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW whose moments exist, so that the first step needs what every step needs."""
    meshes: dict[Any, list[Tensor]] = {}
    for parameter in model.parameters():
        meshes.setdefault(parameter.device_mesh, []).append(parameter)
        parameter.grad = torch.zeros_like(parameter)
    groups = [{"params": members} for members in meshes.values()]  # one call has one mesh
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=device.type == "cuda", foreach=False)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


class Peaks:
    """GiB at the peak of each part of a step, on this rank."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.found = device.type == "cuda", {}

    def end_of(self, part: str) -> None:
        """Note the peak since the last call."""
        if self.cuda:
            self.found[part] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()


def stepper(settings: Row, parallel: Parallel, device: torch.device, peaks: Peaks) -> Callable[[], None]:
    """A step over `blocks` sequences of random tokens for each group of ranks that share one."""
    model, cp = parallel.model, parallel.mesh["cp"]
    optimizer = optimizer_of(model, device)
    peaks.end_of("start")
    if cp.size() > 1 or settings["way"] == RING:
        spread(model, settings["way"], cp.get_group(), settings["S"] // cp.size())
    positions = tokens_of(settings["way"], settings["S"], cp.get_local_rank(), cp.size()).to(device)[None]
    ids = torch.randint(model.config.vocab_size, positions.shape, device=device)
    sliced = {"labels": ids, "shift_labels": ids, "num_items_in_batch": ids.numel()}

    def step() -> None:
        for block in range(settings["blocks"]):
            if settings["loss slice"] is None:
                logits = model(ids, position_ids=positions, use_cache=False).logits
                loss = F.cross_entropy(logits[0].float(), ids[0])
                del logits
            else:
                loss = model(ids, position_ids=positions, use_cache=False, **sliced).loss
            peaks.end_of("forward")
            parallel.backward(loss, last=block + 1 == settings["blocks"])
            peaks.end_of("backward")
        optimizer.step()
        optimizer.zero_grad()
        peaks.end_of("update")

    return step


def work(settings: Row, device: torch.device) -> Iterator[Row]:
    """The row of a layout.

    Args:
        settings: see `searches.step_of`.
        device: of this rank.
    """
    layout = Layout.parse(settings["layout"])
    parallel, peaks = model_of(settings, layout.mesh(device.type), device), Peaks(device)
    step = stepper(settings, parallel, device, peaks)
    row: Row = {**settings, "piece": "step", "ranks": layout.ranks, "parameters": parameters(sizes_of(settings))}
    with hollow_ring() if settings["hollow"] else nullcontext():
        row |= measured(step, device, BUDGET, most=5)
        if layout.ranks > 1 and layout.tp == 1 and not settings["hollow"] and row["seconds"] < BUDGET:
            found = dict(peaks.found)
            with silenced():
                row["without messages s"] = measured(step, device, BUDGET, most=5)["seconds"]
            peaks.found = found
    row["peaks GiB"] = {part: slowest(peak, device) for part, peak in peaks.found.items()}
    row["peak GiB"] = max(row["peaks GiB"].values(), default=0.0)
    if device.type == "cuda":
        row["reserved GiB"] = slowest(torch.cuda.max_memory_reserved() / 2**30, device)
    row["tokens/s"] = layout.dp * settings["blocks"] * settings["S"] / row["seconds"]
    if settings["hollow"]:
        del row["tokens/s"], row["seconds"]  # no step of a model
    dist.barrier()
    yield row
