"""One sequence over many devices, on torch.distributed: the halo that a pattern needs, and its exchange."""

from pi_attention.distributed.context import HaloContext, shard
from pi_attention.distributed.layout import Layout, Parallel
from pi_attention.distributed.plan import HaloPlan, halo_plan
from pi_attention.distributed.sharding import attach, detach, prefill

__all__ = ["HaloContext", "HaloPlan", "Layout", "Parallel", "attach", "detach", "halo_plan", "prefill", "shard"]
