"""Train a small model on sequences that are sharded over ranks, parameters sharded by FSDP2 over all of them.

    torchrun --nproc-per-node 4 examples/context_parallel.py --cp 2          # data parallel 2 × context parallel 2

On GPUs the same command uses NCCL. Each group of `cp` ranks shares a sequence; each rank holds a contiguous part of it.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pi_attention.accelerator import best_device
from pi_attention.distributed import attach, shard
from pi_attention.models import PiConfig, PiForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cp", type=int, default=2, help="ranks that share a sequence")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    kind = best_device().type
    dist.init_process_group(dist.get_default_backend_for_device(kind))  # NCCL on NVIDIA GPUs, Gloo on the CPU
    train(kind, options.cp, options.context, options.steps)
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()


def train(kind: str, cp: int, context: int, steps: int) -> None:
    ranks = dist.get_world_size()
    if ranks % cp:
        raise SystemExit(f"cp={cp} must divide the {ranks} ranks that torchrun started.")
    mesh = init_device_mesh(kind, (ranks // cp, cp), mesh_dim_names=("dp", "cp"))
    if kind != "cpu":
        torch.accelerator.set_device_index(dist.get_rank() % torch.accelerator.device_count())

    torch.manual_seed(0)
    model = PiForCausalLM(PiConfig(vocab_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
                                   window=32, period=32, skips=8, gate=True)).to(kind)  # fmt: skip
    lengths = [context // cp] * cp
    attach(model, mesh["cp"], lengths)
    everyone = mesh["dp", "cp"]._flatten("dp_cp")  # every rank has other tokens, so parameters are sharded over all
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    ends, rank = [length * (i + 1) for i, length in enumerate(lengths)], mesh["cp"].get_local_rank()

    def cut(x: torch.Tensor) -> torch.Tensor:
        return shard(x, ends, rank)

    generator = torch.Generator().manual_seed(mesh["dp"].get_local_rank())
    start = torch.randint(64, (1, 16), generator=generator)
    ids = start.repeat(1, context // 16).to(kind)  # something to learn: a period of 16
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)  # shifted before it is cut
    positions = torch.arange(context, device=kind)[None]
    for step in range(steps):
        logits = model(cut(ids), position_ids=cut(positions), use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), cut(labels).flatten(), ignore_index=-100, reduction="sum")
        loss = loss * ranks / ((context - 1) * (ranks // cp))  # FSDP averages over the ranks
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step}  loss {mean.item():.6f}", flush=True)


if __name__ == "__main__":
    main()
