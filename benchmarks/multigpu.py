"""Context parallelism on several GPUs: the halo against an all-gather, and against dense Ring Attention.

    NCCL_NVLS_ENABLE=0 torchrun --standalone --nproc-per-node 2 -m benchmarks.multigpu
    torchrun --standalone --nproc-per-node 2 -m benchmarks.multigpu --dry-run    # toy sizes, on gloo and CPUs

Checks first that the shards' outputs and gradients are those of one device, then times forward + backward of the
operator, and a training step of a 1 B model under FSDP2 and context parallelism. Writes
results/multigpu-<ranks>x<device>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.ring_attention import RingAttention, chunks_of
from benchmarks.timing import write
from pi_attention import PiPattern, pi_attention
from pi_attention.distributed import HaloContext, attach, halo_plan
from pi_attention.models import PiConfig, PiForCausalLM
from pi_attention.training.train import enable_checkpointing

PATTERN = PiPattern(256, 256, 16)


class Gather(torch.autograd.Function):
    """Rows [tokens, …] of every rank in order; the gradients are summed and scattered."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        every = rows.new_empty(dist.get_world_size(group) * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(every, rows.contiguous(), group)
        return every

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(len(grad) // dist.get_world_size(ctx.group), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All shards of [B, G, T, D] in order."""
    return Gather.apply(x.permute(2, 0, 1, 3), group).permute(1, 2, 0, 3)


class Case:
    """One sequence, sharded: inputs, and what runs on them."""

    def __init__(self, total: int, heads: int, dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self.group = dist.group.WORLD
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.tokens, self.total = total // self.ranks, total
        generator = torch.Generator(device).manual_seed(0)
        shape = 4, 1, heads, total, dim
        # every rank draws the whole of a short sequence, for the check; of a long one its own shard
        whole = shape if total <= 1 << 14 else (4, 1, heads, self.tokens, dim)
        self.whole = torch.randn(whole, generator=generator, device=device).to(dtype)
        self.gate = torch.randn(1, heads, whole[3], generator=generator, device=device)

    def mine(self) -> list[Tensor]:
        """Query, key, value and gate of the shard, to be differentiated; and the output's gradient."""
        start = self.rank * self.tokens if self.whole.shape[3] == self.total else 0
        parts = [x[:, :, start : start + self.tokens].clone() for x in (*self.whole[:3], self.gate)]
        return [*(x.requires_grad_() for x in parts), self.whole[3][:, :, start : start + self.tokens]]

    def halo(self) -> Callable[[], list[Tensor]]:
        """Ours."""
        context = HaloContext(self.group, [self.tokens] * self.ranks, PATTERN)

        def run() -> list[Tensor]:
            query, key, value, gate, grad = self.mine()
            out = context.attention(query, key, value, gate=gate)
            out.backward(grad)
            return [out.detach(), *(x.grad for x in (query, key, value, gate))]

        return run

    def silent(self) -> Callable[[], list[Tensor]]:
        """The same work as `halo`, without an exchange: keys that are there already."""
        context = HaloContext(self.group, [self.tokens] * self.ranks, PATTERN)
        more = context.halo.length - self.tokens

        def run() -> list[Tensor]:
            query, key, value, gate, grad = self.mine()
            key, value = (torch.cat([x[:, :, :more].detach(), x], dim=2) for x in (key, value))
            out = pi_attention(query, key, value, PATTERN, gate=gate)
            out.backward(grad)
            return [out.detach()]

        return run

    def all_gather(self) -> Callable[[], list[Tensor]]:
        """Every key to every rank, then those up to its own."""

        def run() -> list[Tensor]:
            query, key, value, gate, grad = self.mine()
            end = (self.rank + 1) * self.tokens
            every = [gathered(x, self.group)[:, :, :end] for x in (key, value)]
            out = pi_attention(query, *every, PATTERN, gate=gate)
            out.backward(grad)
            return [out.detach(), *(x.grad for x in (query, key, value, gate))]

        return run

    def ring(self) -> Callable[[], list[Tensor]]:
        """Dense attention."""

        def run() -> list[Tensor]:
            query, key, value, _, grad = self.mine()
            out = RingAttention.apply(query, key, value, self.group)
            out.backward(grad)
            return [out.detach(), *(x.grad for x in (query, key, value))]

        return run

    def check(self) -> dict[str, float]:
        """The largest relative error of outputs and gradients against one device that has the whole sequence."""

        def error(got: Tensor, want: Tensor) -> float:
            got, want = got.detach().float(), want.detach().float()
            return float((got - want).norm() / want.norm())

        inputs = [x.clone().requires_grad_() for x in (*self.whole[:3], self.gate)]
        want = pi_attention(*inputs[:3], PATTERN, gate=inputs[3])
        grads = torch.autograd.grad(want, inputs, self.whole[3])
        cut = slice(self.rank * self.tokens, (self.rank + 1) * self.tokens)
        found = {}
        for name, run in (("halo", self.halo()), ("all-gather", self.all_gather())):
            found[name] = max(error(a, b[:, :, cut]) for a, b in zip(run(), (want, *grads), strict=True))
        dense = [x.detach().clone().requires_grad_() for x in inputs[:3]]
        want = F.scaled_dot_product_attention(*dense, is_causal=True)
        grads = torch.autograd.grad(want, dense, self.whole[3])
        # the ring's ranks hold two chunks each: give them those, and compare there
        length = self.total // (2 * self.ranks)
        places = torch.cat([torch.arange(length) + length * chunk for chunk in chunks_of(self.rank, self.ranks)])
        places = places.to(want.device)
        parts = [x.detach()[:, :, places].clone().requires_grad_() for x in dense]
        out = RingAttention.apply(*parts, self.group)
        out.backward(self.whole[3][:, :, places])
        got = [out, *(x.grad for x in parts)]
        found["ring"] = max(error(a, b[:, :, places]) for a, b in zip(got, (want, *grads), strict=True))
        return found


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, float]:
    """Median seconds of the slowest rank, and its peak MiB."""
    cuda = device.type == "cuda"
    times = []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 2):
        dist.barrier()
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
    slowest = torch.tensor([statistics.median(times[2:]), peak], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest[0]), float(slowest[1])


def training_step(total: int, device: torch.device, small: bool) -> dict[str, float]:
    """Forward, backward and AdamW of one sequence over all ranks; FSDP2 shards weights and optimizer over them too."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "vocab_size": 32000}
    if small:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    torch.manual_seed(0)
    with torch.device(device):
        model = PiForCausalLM(PiConfig(**sizes, window=256, period=256, skips=16))
    enable_checkpointing(model)
    model.train()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    tokens = total // ranks
    group = dist.new_group()  # of its own, so that keys do not queue behind FSDP's weights
    attach(model, group, [tokens] * ranks)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if device.type == "cuda" else MixedPrecisionPolicy()
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    ids = torch.randint(sizes["vocab_size"], (1, tokens), device=device)
    positions = torch.arange(rank * tokens, (rank + 1) * tokens, device=device)[None]

    def step() -> None:
        logits = model(ids, position_ids=positions, use_cache=False).logits
        loss = F.cross_entropy(logits[0].float(), ids[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds, peak = seconds_of(step, device, 3)
    count = sum(p.numel() for p in model.parameters())
    return {"S": total, "parameters": count, "seconds": seconds, "tokens/s": total / seconds, "peak GiB": peak / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on gloo and CPUs")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072, 524288, 1048576])
    parser.add_argument("--ring-to", type=int, default=262144, help="longest sequence of dense Ring Attention")
    parser.add_argument("--model-lengths", type=int, nargs="*", default=[32768, 131072])
    options = parser.parse_args()
    small = options.dry_run
    dist.init_process_group("gloo" if small else "nccl")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu") if small else torch.device("cuda", rank)
    if not small:
        torch.cuda.set_device(device)
    lengths = [4096, 8192] if small else options.lengths
    heads, dim, dtype = (2, 16, torch.float32) if small else (16, 128, torch.bfloat16)
    name = "CPU" if small else torch.cuda.get_device_name()
    result: dict[str, Any] = {"device": name, "ranks": ranks, "H": heads, "D": dim, "pattern": "256, 256, 16"}
    errors = Case(8192, heads, dim, device, dtype).check()
    worst = torch.tensor(list(errors.values()), device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    result["largest relative error"] = dict(zip(errors, worst.tolist(), strict=True))
    if worst.max() > (1e-5 if small else 2e-2):
        raise SystemExit(f"the shards differ from the whole: {result['largest relative error']}")
    result |= {"operator": [], "training step": []}

    def keep(kind: str, row: dict[str, Any]) -> None:
        result[kind].append(row)
        if rank == 0:
            print(json.dumps(row), flush=True)
            if not small:
                write(f"multigpu-{ranks}x{name.replace(' ', '-').lower()}", result)

    for total in lengths:
        case = Case(total, heads, dim, device, dtype)
        runs = {"halo": case.halo(), "no exchange": case.silent(), "all-gather": case.all_gather()}
        if total <= options.ring_to:
            runs["dense ring"] = case.ring()
        halos = halo_plan(PATTERN, [case.tokens] * ranks).halos
        row: dict[str, Any] = {"S": total, "halo rows": max(halo.rows for halo in halos)}
        for kind, run in runs.items():
            seconds, peak = seconds_of(run, device, 5)
            row[kind] = {"ms": 1e3 * seconds, "peak MiB": peak}
        keep("operator", row)
        del case, runs
    for total in [1024] if small else options.model_lengths:
        keep("training step", training_step(total, device, small))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
