"""Dense causal attention over a sharded sequence, for comparison: Ring Attention (arXiv 2310.01889), written plainly.

Each rank holds two chunks, the i-th from either end of the sequence, so that all have the same causal work. Keys and
values travel round the ring while their attention is computed; in the backward pass their gradients travel along.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

aten = torch.ops.aten
Block = tuple[Tensor, Tensor]


def chunks_of(rank: int, ranks: int) -> tuple[int, int]:
    """Which two of 2 · ranks chunks a rank holds."""
    return rank, 2 * ranks - 1 - rank


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Block:
    """Attention over one block of keys: out [B, H, T, D] and log-sum-exp [B, H, T]."""
    if query.is_cuda:
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal)[:2]
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal)


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a block, given the output and log-sum-exp over all blocks."""
    if not query.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, query, key, value, out, lse, 0.0, causal)
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    offset = torch.zeros((), dtype=torch.uint64, device=query.device)
    sizes = (query.shape[2], key.shape[2], 0.0, causal, seed, offset)
    return aten._scaled_dot_product_flash_attention_backward(grad, query, key, value, out, lse, None, None, *sizes)


def joined(one: Block | None, other: Block) -> Block:
    """Attention over two sets of keys from that over each; sums in fp32."""
    if one is None:
        return other[0].float(), other[1]
    total = torch.logaddexp(one[1], other[1])
    share = (other[1] - total).exp()[..., None]
    return one[0] * (one[1] - total).exp()[..., None] + other[0].float() * share, total


def passed_on(blocks: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """Send a tensor to the next rank while the previous one's arrives."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    arriving = torch.empty_like(blocks)
    sending = dist.P2POp(dist.isend, blocks, group=group, group_peer=(rank + 1) % ranks)
    receiving = dist.P2POp(dist.irecv, arriving, group=group, group_peer=(rank - 1) % ranks)
    return arriving, dist.batch_isend_irecv([sending, receiving])


class RingAttention(torch.autograd.Function):
    """query, key, value [B, H, T, D] of a rank's two chunks -> out of the same shape."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        mine = chunks_of(rank, ranks)
        queries = [q.contiguous() for q in query.chunk(2, dim=2)]
        blocks = torch.stack([key, value])
        found: list[Block | None] = [None, None]
        for step in range(ranks):
            arriving, work = passed_on(blocks, group) if step + 1 < ranks else (blocks, [])
            theirs = chunks_of((rank - step) % ranks, ranks)
            parts = [part.contiguous() for part in blocks.chunk(2, dim=3)]
            for i, j in ((i, j) for i in range(2) for j in range(2) if theirs[j] <= mine[i]):
                found[i] = joined(found[i], attend(queries[i], parts[j][0], parts[j][1], theirs[j] == mine[i]))
            for waited in work:
                waited.wait()
            blocks = arriving
        out = torch.cat([part[0] for part in found if part is not None], dim=2).to(query.dtype)
        ctx.save_for_backward(query, key, value, out, torch.cat([part[1] for part in found if part], dim=2))
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, lse = ctx.saved_tensors
        ranks, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        mine = chunks_of(rank, ranks)
        halves = [[x.contiguous() for x in tensor.chunk(2, dim=2)] for tensor in (grad, query, out, lse)]
        grad_query = [torch.zeros_like(q, dtype=torch.float32) for q in halves[1]]
        blocks, gathered = torch.stack([key, value]), torch.zeros(2, *key.shape, dtype=torch.float32, device=key.device)
        for step in range(ranks):
            arriving, work = passed_on(blocks, ctx.group) if step + 1 < ranks else (blocks, [])
            theirs = chunks_of((rank - step) % ranks, ranks)
            parts, sums = [part.contiguous() for part in blocks.chunk(2, dim=3)], gathered.chunk(2, dim=3)
            for i, j in ((i, j) for i in range(2) for j in range(2) if theirs[j] <= mine[i]):
                g, q, o, l = (half[i] for half in halves)
                dq, dk, dv = attend_backward(g, q, parts[j][0], parts[j][1], o, l, theirs[j] == mine[i])
                grad_query[i] += dq
                sums[j][0].add_(dk)
                sums[j][1].add_(dv)
            for waited in work:
                waited.wait()
            if ranks > 1:
                gathered, work = passed_on(gathered, ctx.group)  # the last step brings each home
            for waited in work:
                waited.wait()
            blocks = arriving
        grad_key, grad_value = gathered.to(key.dtype)
        return torch.cat(grad_query, dim=2).to(query.dtype), grad_key, grad_value, None
