"""One step's loss and gradients of a model: on one device, or spread over a mesh of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from pi_attention.distributed.context import shard
from pi_attention.distributed.sharding import attach
from pi_attention.distributed.tensor_parallel import split_heads
from pi_attention.models.loss import IGNORE, cross_entropy
from pi_attention.nn.attention import PiAttention
from pi_attention.segments import segment_starts


class Parallel:
    """A model on one device, or spread over a mesh, and one rank's part in it.

    Over a mesh it applies, in this order, tensor parallelism, FSDP2 over all ranks that see different tokens, and the
    halo exchange.

    Args:
        model: a causal language model with a list `model.model.layers`, such as `PiForCausalLM`; the same weights on
            every rank. Changed in place.
        mesh: from `Layout.mesh`; None is one process, which needs no process group.
        zero: 3 shards parameters, gradients and optimizer (ZeRO-3); 2 keeps the parameters whole between forward and
            backward; 1 also keeps the gradients whole while batches are accumulated.
        bf16: compute in bf16, keep weights and sum gradients in fp32.
        compiled: call the model through torch.compile.

    Raises:
        ValueError: zero is something else, or heads or features do not divide.

    Example::

        parallel = Parallel(model, Layout.parse("dp=2,cp=2").mesh("cpu"))
        loss = parallel.loss(batch)  # blocks of PackedBlocks, stacked
        parallel.backward(loss)
    """

    def __init__(
        self, model: Any, mesh: DeviceMesh | None = None, *, zero: int = 3, bf16: bool = False, compiled: bool = False
    ) -> None:
        if zero not in (1, 2, 3):
            raise ValueError(f"zero={zero} must be 3, 2 or 1.")
        self.model, self.mesh, self.zero, self.bf16 = model, mesh, zero, bf16
        self.sinks = any(module.pattern.sinks for module in model.modules() if isinstance(module, PiAttention))
        self.everyone: DeviceMesh | None = None
        self.call = torch.compile(model) if compiled else model
        if mesh is None:
            return
        if mesh["tp"].size() > 1:
            split_heads(model, mesh["tp"])
        self.everyone = mesh["dp", "cp"]._flatten("dp_cp")
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=self.everyone, mp_policy=policy, reshard_after_forward=zero == 3)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that reports."""
        return self.mesh is None or dist.get_rank() == 0

    def place(self, name: str) -> tuple[int, int]:
        """The number of this rank, and how many there are, along "dp", "cp" or "tp"."""
        return (0, 1) if self.mesh is None else (self.mesh[name].get_local_rank(), self.mesh[name].size())

    @property
    def one_row(self) -> bool:
        """Whether a batch must be one row: documents with sinks on a shared sequence have their places in the plan."""
        return self.sinks and self.place("cp")[1] > 1

    def loss(self, batch: dict[str, Tensor], tokens: int | None = None) -> Tensor:
        """The rank's share of the mean loss: after FSDP's mean over the ranks, gradients are those of one process.

        Args:
            batch: input_ids, segment_ids and labels [B, T] of whole sequences, the same on all ranks that share them;
                labels are not shifted. B is 1 where `one_row`.
            tokens: predicted tokens of the whole step, over all ranks and accumulations, by which the sum of losses is
                divided; those of this batch when None.
        """
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)  # shifted before they are cut
        given = {
            "input_ids": batch["input_ids"],
            "position_ids": torch.arange(labels.shape[1], device=labels.device) - segment_starts(batch["segment_ids"]),
            "segment_ids": batch["segment_ids"],  # or the model would look for documents in the positions
        }
        rank, ranks = self.place("cp")
        mine = labels
        if ranks > 1:
            ends = [labels.shape[1] * (number + 1) // ranks for number in range(ranks)]
            self._attach(batch["segment_ids"], ends)
            if self.sinks:
                del given["segment_ids"]
            given, mine = {name: shard(x, ends, rank) for name, x in given.items()}, shard(labels, ends, rank)
        count = (labels != IGNORE).sum() if tokens is None else tokens
        return self._sum(given, mine) * (1 if self.everyone is None else self.everyone.size()) / count

    def _attach(self, segment_ids: Tensor, ends: list[int]) -> None:
        assert self.mesh is not None
        lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        if self.sinks:  # they lie where documents start
            documents = [0, *((segment_ids[0, 1:] != segment_ids[0, :-1]).nonzero()[:, 0] + 1).tolist()]
            attach(self.model, self.mesh["cp"], lengths, documents)
        else:
            attach(self.model, self.mesh["cp"], lengths, segment_ids=segment_ids)

    def _sum(self, given: dict[str, Tensor], labels: Tensor) -> Tensor:
        """The sum of the losses of shifted labels."""
        under_fsdp = self.mesh is not None  # which casts by its own policy
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.bf16 and not under_fsdp):
            if getattr(self.model.config, "loss_slice", None) is not None:
                summed = {"labels": labels, "shift_labels": labels, "num_items_in_batch": 1}
                return self.call(**given, use_cache=False, **summed).loss
            return cross_entropy(self.call(**given, use_cache=False).logits, labels)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradients of a batch's `loss`.

        Args:
            loss: from `loss`.
            last: whether it is the last batch of the step, after which gradients are summed over the ranks (zero=1).
        """
        if self.mesh is not None and self.zero == 1:
            self.model.set_requires_gradient_sync(last)
        loss.backward()

    def mean(self, values: Tensor) -> Tensor:
        """The mean of detached numbers over all ranks; of sums of `loss`, that is the mean loss of a step."""
        if self.mesh is None:
            return values.detach()
        total = values.detach() / dist.get_world_size()
        dist.all_reduce(total)
        return total
