"""One sequence over many devices, on torch.distributed: the halo that a pattern needs, and its exchange."""

from pi_attention.distributed.context import HaloContext, shard
from pi_attention.distributed.layout import Layout
from pi_attention.distributed.plan import HaloPlan, halo_plan
from pi_attention.distributed.sharding import attach, detach, prefill
from pi_attention.distributed.tensor_parallel import split_heads

__all__ = ["HaloContext", "HaloPlan", "Layout", "attach", "detach", "halo_plan", "prefill", "shard", "split_heads"]
