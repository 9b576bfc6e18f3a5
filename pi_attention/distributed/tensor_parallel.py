"""Tensor parallelism by PyTorch's own engine: heads, with their periods, phases and gates, and features over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from pi_attention.nn.attention import PiAttention
from pi_attention.nn.layers import SwiGLU


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


class NormOfHeads(nn.RMSNorm):
    """A norm of queries or keys, whose weight all heads share, where each rank has some of the heads.

    Args:
        norm: whose weight it takes, under the same name.
        group: the ranks that share the heads.
    """

    def __init__(self, norm: nn.RMSNorm, group: ProcessGroup) -> None:
        super().__init__(norm.normalized_shape, norm.eps)
        self.weight, self.group = norm.weight, group

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
        NotImplementedError: a layer has a sink logit.
    """
    ranks, rank = mesh.size(), mesh.get_local_rank()
    columns, rows = ColwiseParallel, RowwiseParallel
    for name, module in list(model.named_modules()):  # norms are replaced on the way
        if isinstance(module, PiAttention):
            heads, groups = (p.weight.shape[0] // module.head_dim for p in (module.q_proj, module.k_proj))
            if heads % ranks or groups % ranks:
                raise ValueError(f"tp={ranks} must divide the {heads} heads and {groups} key heads of {name}.")
            if module.sink_logit is not None:
                raise NotImplementedError(f"tensor parallelism does not split the sink logit of {name}: take cp or dp.")
            plan: dict[str, Any] = {"q_proj": columns(), "k_proj": columns(), "v_proj": columns(), "o_proj": rows()}
            if module.gate is not None:
                plan["gate.fc_out"] = columns()
            per_rank = heads // ranks
            module.pattern = module.pattern.of_heads(rank * per_rank, (rank + 1) * per_rank)
            if module.q_norm is not None and module.k_norm is not None:
                module.q_norm, module.k_norm = (
                    NormOfHeads(norm, mesh.get_group()) for norm in (module.q_norm, module.k_norm)
                )
        elif isinstance(module, SwiGLU):
            features = module.gate_proj.out_features
            if features % ranks:
                raise ValueError(f"tp={ranks} must divide the {features} features of {name}.")
            plan = {"gate_proj": columns(), "up_proj": columns(), "down_proj": rows()}
        else:
            continue
        parallelize_module(module, mesh, plan)
