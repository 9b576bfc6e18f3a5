"""Data, tensor and context parallelism of a model together, by PyTorch's own engines; the halo is all that is ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from pi_attention.distributed.context import shard
from pi_attention.distributed.sharding import attach
from pi_attention.nn.attention import PiAttention
from pi_attention.nn.layers import SwiGLU
from pi_attention.segments import segment_starts

IGNORE = -100


@dataclass(frozen=True)
class Layout:
    """How many ranks share what.

    Args:
        dp: groups of ranks that work on different sequences.
        tp: ranks that share the heads and the features of each layer.
        cp: ranks that share a sequence.

    Example::

        layout = Layout.parse("dp=2,tp=1,cp=2")
    """

    dp: int = 1
    tp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "cp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def __str__(self) -> str:
        return f"dp={self.dp},tp={self.tp},cp={self.cp}"

    @staticmethod
    def parse(text: str) -> Layout:
        """A layout from text such as "dp=2,cp=4"; what is left out is 1.

        Raises:
            ValueError: the text is something else; the message says what.
        """
        known, sizes = [field.name for field in fields(Layout)], {}
        for part in filter(None, text.split(",")):
            name, _, size = part.strip().partition("=")
            if name not in known or not size.isdigit():
                raise ValueError(f'parallel={text!r}: {part!r} is not one of dp=N, tp=N, cp=N, as in "dp=2,cp=4".')
            sizes[name] = int(size)
        return Layout(**sizes)

    @property
    def ranks(self) -> int:
        """dp · tp · cp."""
        return self.dp * self.tp * self.cp

    def mesh(self, kind: str) -> DeviceMesh:
        """The ranks as a mesh [dp, cp, tp]; tensor-parallel ranks are neighbours, since they talk the most.

        Raises:
            ValueError: the process group has another number of ranks.
        """
        if dist.get_world_size() != self.ranks:
            raise ValueError(
                f"parallel={self} needs {self.ranks} ranks, but {dist.get_world_size()} were started: "
                f"torchrun --nproc-per-node {self.ranks}, or another layout."
            )
        return init_device_mesh(kind, (self.dp, self.cp, self.tp), mesh_dim_names=("dp", "cp", "tp"))


class _SumGradient(torch.autograd.Function):
    """The same value; the gradient is summed over the ranks that use it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _NormOfHeads(nn.RMSNorm):
    """The norm of queries or keys, whose weight all heads share, where each rank has some of the heads."""

    group: ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, _SumGradient.apply(self.weight, self.group), self.eps)


def split_heads(model: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism: split the heads of each `PiAttention` and the features of each `SwiGLU` over the ranks.

    A head's period, phase and gate go with it. Embeddings, norms and the output layer stay whole on every rank.

    Args:
        model: with the same weights on every rank.
        mesh: of one dimension.

    Raises:
        ValueError: heads or features do not divide.
    """
    ranks, rank = mesh.size(), mesh.get_local_rank()
    columns, rows = ColwiseParallel, RowwiseParallel
    for name, module in model.named_modules():
        if isinstance(module, PiAttention):
            heads, groups = (p.weight.shape[0] // module.head_dim for p in (module.q_proj, module.k_proj))
            if heads % ranks or groups % ranks:
                raise ValueError(f"tp={ranks} must divide the {heads} heads and {groups} key heads of {name}.")
            plan: dict[str, Any] = {"q_proj": columns(), "k_proj": columns(), "v_proj": columns(), "o_proj": rows()}
            if module.gate is not None:
                plan["gate.fc_out"] = columns()
            per_rank = heads // ranks
            module.pattern = module.pattern.of_heads(rank * per_rank, (rank + 1) * per_rank)
            for norm in (module.q_norm, module.k_norm):
                if norm is not None:
                    norm.__class__ = _NormOfHeads
                    norm.group = mesh.get_group()  # type: ignore[assignment]
        elif isinstance(module, SwiGLU):
            features = module.gate_proj.out_features
            if features % ranks:
                raise ValueError(f"tp={ranks} must divide the {features} features of {name}.")
            plan = {"gate_proj": columns(), "up_proj": columns(), "down_proj": rows()}
        else:
            continue
        parallelize_module(module, mesh, plan)


class Parallel:
    """A model spread over a mesh, and one rank's part in it.

    Applies, in this order, tensor parallelism, the halo exchange, and FSDP2 over all ranks that see different tokens.

    Args:
        model: a causal language model with a list `model.model.layers`, such as `PiForCausalLM`; the same weights on
            every rank. Changed in place.
        mesh: from `Layout.mesh`.
        zero: 3 shards parameters, gradients and optimizer (ZeRO-3); 2 keeps the parameters whole between forward and
            backward; 1 also keeps the gradients whole while blocks are accumulated.
        bf16: compute in bf16, keep weights and sum gradients in fp32.

    Example::

        parallel = Parallel(model, Layout.parse("dp=2,cp=2").mesh("cpu"))
        loss = parallel.loss(block)  # a block of PackedBlocks with a batch dimension
        parallel.backward(loss)
    """

    def __init__(self, model: Any, mesh: DeviceMesh, *, zero: int = 3, bf16: bool = False) -> None:
        if zero not in (1, 2, 3):
            raise ValueError(f"zero={zero} must be 3, 2 or 1.")
        self.model, self.mesh, self.zero = model, mesh, zero
        if mesh["tp"].size() > 1:
            split_heads(model, mesh["tp"])
        self.sinks = any(module.pattern.sinks for module in model.modules() if isinstance(module, PiAttention))
        self.everyone = mesh["dp", "cp"]._flatten("dp_cp")
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=self.everyone, mp_policy=policy, reshard_after_forward=zero == 3)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that reports."""
        return dist.get_rank() == 0

    def loss(self, block: dict[str, Tensor], blocks: int = 1) -> Tensor:
        """The rank's share of the mean loss: after FSDP's mean over the ranks, gradients are those of one process.

        Args:
            block: input_ids, segment_ids and labels [1, T] of the whole sequence, the same on all ranks that share it;
                labels are not shifted.
            blocks: blocks that are summed up in a step, over all ranks and accumulations.
        """
        tokens, ranks = block["input_ids"].shape[1], self.mesh["cp"].size()
        ends = [tokens * (rank + 1) // ranks for rank in range(ranks)]
        lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        segments, marked = block["segment_ids"], {}
        if self.sinks:  # they lie where documents start
            documents = [0, *((segments[0, 1:] != segments[0, :-1]).nonzero()[:, 0] + 1).tolist()]
            attach(self.model, self.mesh["cp"], lengths, documents)
        else:
            attach(self.model, self.mesh["cp"], lengths, segment_ids=segments)
            marked["segment_ids"] = segments  # or the model would look for documents in the positions
        positions = torch.arange(tokens, device=segments.device) - segment_starts(segments)
        labels = F.pad(block["labels"][:, 1:], (0, 1), value=IGNORE)  # shifted before they are cut
        rank = self.mesh["cp"].get_local_rank()
        ids, positions, mine = (shard(x, ends, rank) for x in (block["input_ids"], positions, labels))
        marked = {name: shard(x, ends, rank) for name, x in marked.items()}
        if getattr(self.model.config, "loss_slice", None) is not None:
            summed = {"labels": mine, "shift_labels": mine, "num_items_in_batch": 1}
            total = self.model(ids, position_ids=positions, use_cache=False, **marked, **summed).loss
        else:
            logits = self.model(ids, position_ids=positions, use_cache=False, **marked).logits
            logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
            total = F.cross_entropy(logits, mine.flatten(), ignore_index=IGNORE, reduction="sum")
        return total * self.everyone.size() / (blocks * (labels != IGNORE).sum())

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradients of a block's `loss`.

        Args:
            loss: from `loss`.
            last: whether it is the last block of the step, after which gradients are summed over the ranks (zero=1).
        """
        if self.zero == 1:
            self.model.set_requires_gradient_sync(last)
        loss.backward()

    def mean(self, loss: Tensor) -> float:
        """The mean loss over all sequences of a step, from each rank's detached sum of `loss`."""
        total = loss.detach().clone() / self.everyone.size()
        dist.all_reduce(total, group=self.everyone.get_group())
        return float(total)


def of_rank(numbers: Sequence[int], rank: int, ranks: int) -> Sequence[int]:
    """A rank's equal part of a sequence."""
    each = len(numbers) // ranks
    return numbers[rank * each : (rank + 1) * each]
