"""A model over a sharded sequence: every layer gets its `HaloContext`, and a prompt is read by all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from pi_attention.distributed.context import HaloContext, shard
from pi_attention.nn.attention import PiAttention
from pi_attention.nn.sources import NewKeys
from pi_attention.pattern import PiPattern


def attach(
    model: nn.Module,
    group: DeviceMesh | ProcessGroup,
    lengths: Sequence[int],
    documents: Any = None,
    *,
    segment_ids: Tensor | None = None,
) -> None:
    """Let every `PiAttention` of a model work on shards of `lengths` tokens; the model's code stays single-device.

    Give the model its shard of the input ids and of the positions (`position_ids`) and `use_cache=False`, and shift
    labels before sharding them: the next token of a shard's last one lies on another rank.

    Args:
        model: with `PiAttention` layers, a `PiForCausalLM` for instance.
        group, lengths, documents: see `HaloContext`; layers of one pattern share a plan.
        segment_ids: [B or 1, S] of the whole sequence, instead of documents: see `HaloContext.set_segments`. Called
            again with the same lengths it changes them alone, so that a compiled model is not compiled anew.

    Raises:
        ValueError: the model has no such layer (a converted model has none), or both kinds of documents are given.
    """
    layers = [module for module in model.modules() if isinstance(module, PiAttention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PiAttention layer: each rank would attend to its shard alone.")
    if documents is not None and segment_ids is not None:
        raise ValueError("give documents or segment_ids, not both.")
    group = group.get_group() if isinstance(group, DeviceMesh) else group
    contexts: dict[PiPattern, HaloContext] = {}
    for layer in layers:
        context = contexts.get(layer.pattern)
        present = layer.source
        if context is None and segment_ids is not None and isinstance(present, HaloContext):
            context = present if present.is_for(group, lengths, layer.pattern) else None
        context = context or HaloContext(group, lengths, layer.pattern, documents)
        contexts[layer.pattern] = layer.source = context
    if segment_ids is not None:
        for context in contexts.values():
            context.set_segments(segment_ids)


def detach(model: nn.Module) -> None:
    """Undo `attach`: every layer sees the sequence that it is given, and no more."""
    for module in model.modules():
        if isinstance(module, PiAttention):
            module.source = NewKeys()


@torch.no_grad()
def prefill(model: Any, input_ids: Tensor, group: DeviceMesh | ProcessGroup) -> Any:
    """A long prompt through the model by all ranks together: the decoding cache of all its tokens but the last.

    Each rank computes a part of the sequence; the cache, which is bounded by the pattern, then is the same on every
    rank, and any of them can go on: `model.generate(input_ids, past_key_values=prefill(model, input_ids, group))`.

    Args:
        model: a `PiForCausalLM`, the same on every rank.
        input_ids: [B, S] of the whole prompt, without padding, the same on every rank.
        group: the ranks that share the work.

    Raises:
        ValueError: the prompt has a single token, the model no `PiAttention` layer, or it recomputes its layers
            (gradient checkpointing while it trains), which fills no cache.
    """
    total = input_ids.shape[1] - 1
    if total < 1:
        raise ValueError(f"input_ids has {input_ids.shape[1]} tokens: a prompt of at least 2 has some to prefill.")
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError("a model that trains with gradient checkpointing fills no cache: call model.eval() first.")
    group = group.get_group() if isinstance(group, DeviceMesh) else group
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    ends = [total * (i + 1) // ranks for i in range(ranks)]
    sources = [(module, module.source) for module in model.modules() if isinstance(module, PiAttention)]
    attach(model, group, [end - start for start, end in zip([0, *ends], ends, strict=False)])
    cache = model.new_cache()
    positions = torch.arange(total, device=input_ids.device)[None]
    try:
        model.base_model(
            input_ids=shard(input_ids[:, :-1], ends, rank),
            position_ids=shard(positions, ends, rank),
            past_key_values=cache,
            use_cache=True,
        )
    finally:
        for module, source in sources:  # perhaps sharded, to train on
            module.source = source
    return cache
