"""The operator on a shard, forward + backward: three ways to the keys, checked against one GPU, then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.multigpu.clock import measured, silenced, slowest
from benchmarks.multigpu.rows import Row
from benchmarks.multigpu.ways import GATHER, HALO, RING, context_of, tokens_of
from pi_attention import PiPattern, coordinated_heads, pi_attention
from pi_attention.distributed import halo_plan

HEADS, DIM = 16, 128
TOY = 4, 16
"""Heads and their features on a CPU."""
PATTERNS = ("one period", "coordinated heads", "sinks")
DENSE = "dense"
BUDGET = 0.3
"""Seconds of a measurement's calls, about."""

Run = Callable[[], list[Tensor]]


def pattern_of(name: str, heads: int) -> PiPattern:
    """A pattern by its name in PATTERNS; the first for any other name."""
    if name == "coordinated heads":
        return coordinated_heads(128, 128, heads, 4)
    return PiPattern(256, 256, 16, sinks=4 if name == "sinks" else 0)


def ways_of(pattern: str, ranks: int) -> list[str]:
    """What is compared on so many ranks; one rank has all keys anyway."""
    return [RING] if pattern == DENSE else [HALO] if ranks == 1 else [HALO, GATHER]


def runner(way: str, pattern: PiPattern, inputs: list[Tensor], grad: Tensor) -> Run:
    """Forward + backward on a shard: the output and the gradients of query, key, value and gate."""
    group, tokens = dist.group.WORLD, inputs[0].shape[2]
    alone = dist.get_world_size() == 1 and way != RING
    context = None if alone else context_of(way, group, tokens, pattern)

    def operator(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, ids: Tensor | None) -> Tensor:
        return pi_attention(query, key, value, pattern, gate=gate, segment_ids=ids)

    def run() -> list[Tensor]:
        query, key, value, gate = inputs
        if context is None:
            out = operator(query, key, value, gate, None)
        else:
            out = context.attend(operator, query, key, value, gate, None)
        differentiated = inputs[:3] if way == RING else inputs
        return [out.detach(), *torch.autograd.grad(out, differentiated, grad)]

    return run


def drawn(length: int, device: torch.device, seed: int) -> tuple[list[Tensor], Tensor]:
    """Query, key, value [1, H, T, D] and gate [1, H, T], and the output's gradient."""
    heads, dim = TOY if device.type == "cpu" else (HEADS, DIM)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(seed)
    parts = [torch.randn(1, heads, length, dim, generator=generator, device=device).to(dtype) for _ in range(4)]
    gate = torch.randn(1, heads, length, generator=generator, device=device)
    return [*(x.requires_grad_() for x in (*parts[:3], gate))], parts[3]


def error_of(way: str, pattern: PiPattern, total: int, device: torch.device) -> float:
    """Largest relative error of output and gradients, over all ranks, against one GPU that has the whole sequence.

    Relative to the norm of an average shard: a gate whose queries see no skip key has no gradient.
    """
    inputs, grad = drawn(total, device, 0)
    if way == RING:
        want = F.scaled_dot_product_attention(*inputs[:3], is_causal=True)
        grads = torch.autograd.grad(want, inputs[:3], grad)
    else:
        want = pi_attention(*inputs[:3], pattern, gate=inputs[3])
        grads = torch.autograd.grad(want, inputs, grad)
    mine = tokens_of(way, total, dist.get_rank(), dist.get_world_size()).to(device)
    shards = [x.detach()[:, :, mine].clone().requires_grad_() for x in inputs]
    found = runner(way, pattern, shards, grad[:, :, mine])()
    pairs = zip(found, (want.detach(), *grads), strict=True)
    errors = [(a.float() - b[:, :, mine].float()).norm() / b.float().norm() for a, b in pairs]
    return slowest(float(torch.stack(errors).max()), device) * dist.get_world_size() ** 0.5


def work(settings: Row, device: torch.device) -> Iterator[Row]:
    """One row that says how far the ways are from one GPU, then one row a length and way.

    Args:
        settings: pattern (a name of PATTERNS, or "dense"), lengths, budget in seconds for dense attention.
        device: of this rank.

    Raises:
        RuntimeError: a way computes something else than one GPU.
    """
    name, ranks = settings["pattern"], dist.get_world_size()
    heads, dim = TOY if device.type == "cpu" else (HEADS, DIM)
    pattern = pattern_of(name, heads)
    shape = {"H": heads, "D": dim, "of": None if name == DENSE else pattern.to_dict()}
    about = {"piece": "operator", "pattern": name, "ranks": ranks} | shape
    ways, bound = ways_of(name, ranks), 1e-5 if device.type == "cpu" else 2e-2
    errors = {way: error_of(way, pattern, 1024 if device.type == "cpu" else 8192, device) for way in ways}
    yield {**about, "piece": "check", "largest relative error": errors}
    if not all(error <= bound for error in errors.values()):
        raise RuntimeError(f"{name}: the shards differ from the whole, {errors}")
    last = 0.0
    for total in settings["lengths"]:
        if name == DENSE and 4 * last > settings["dense seconds"]:
            return  # twice the tokens, four times the products
        inputs, grad = drawn(total // ranks, device, dist.get_rank())
        for way in ways:
            run = runner(way, pattern, inputs, grad)
            row = measured(run, device, BUDGET)
            last = row["seconds"]
            if ranks > 1:
                with silenced():
                    row["without messages s"] = measured(run, device, BUDGET)["seconds"]
            if way == HALO:
                row["halo rows"] = max(halo.rows for halo in halo_plan(pattern, [total // ranks] * ranks).halos)
            yield {**about, "S": total, "way": way} | row
