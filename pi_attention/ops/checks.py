"""Validation of the operator's arguments. Each message names the argument, its value and the remedy."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pi_attention.pattern import PiPattern, need_pattern

FUSIONS = ("gate", "mass")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FP32 = torch.finfo(torch.float32)
"""In which scores are capped, of all inputs but fp64."""


def refuse_context_parallel() -> None:
    """Raise RuntimeError while PyTorch's `context_parallel` (accelerate's `cp_size` too) has cut the sequence.

    It replaces `scaled_dot_product_attention` by its own; no other attention learns of it.
    """
    if (F.scaled_dot_product_attention.__module__ or "").startswith("torch.distributed."):
        raise RuntimeError(
            "torch's context_parallel (accelerate's cp_size) is active: it has cut the sequence, and π-attention would "
            "see one rank's part alone. Leave it, and shard with pi_attention.distributed.attach, or "
            "pi-attention train --parallel cp=N."
        )


def check_scale(scale: Any) -> float:
    """The factor of the scores; TypeError or ValueError where it is no finite number.

    A tensor is refused: it would get no gradient.
    """
    if isinstance(scale, Tensor | str | bool):
        raise TypeError(f"scale must be a float, got {type(scale).__name__}: multiply the query by what is learned.")
    if not torch.compiler.is_compiling():
        if not isinstance(scale, Real):
            raise TypeError(f"scale must be a float, got {scale!r}: pass one number, or None for 1/√D.")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}: None is 1/√D.")
    return float(scale)


def check_softcap(softcap: Any) -> float | None:
    """The cap of the scores, or None for none; TypeError or ValueError where it is no number above 0, finite in fp32.

    While torch.compile traces, a number has no value yet: the operators of a compiled graph ask again when they run.
    """
    if softcap is None:
        return None
    if isinstance(softcap, Tensor | str | bool):
        raise TypeError(f"softcap must be a float or None, got {type(softcap).__name__}: pass one number.")
    if not torch.compiler.is_compiling():
        if not isinstance(softcap, Real):
            raise TypeError(f"softcap must be a float or None, got {softcap!r}: pass one number.")
        if not FP32.tiny <= float(softcap) <= FP32.max:
            raise ValueError(
                f"softcap must be finite and above 0, got {softcap} (of fp32): None leaves scores as they are."
            )
    return float(softcap)


def check_sink_logit(sink_logit: Any, query: Tensor) -> None:
    """Raise TypeError or ValueError where `sink_logit` is no floating-point tensor [H] beside the query."""
    if not isinstance(sink_logit, Tensor):
        raise TypeError(
            f"sink_logit must be a floating-point Tensor [H] or None, got {sink_logit!r}: one number serves all heads "
            "as torch.full((H,), number)."
        )
    if not sink_logit.is_floating_point():
        raise TypeError(f"sink_logit must be a floating-point Tensor [H], got {sink_logit.dtype}: cast it to float32.")
    check_layout("sink_logit", sink_logit, "[H]")
    if sink_logit.shape != query.shape[1:2]:
        raise ValueError(
            f"sink_logit must be [H] = {tuple(query.shape[1:2])}, got {tuple(sink_logit.shape)}: "
            "one for each query head."
        )
    if sink_logit.device != query.device:
        raise ValueError(f"sink_logit is on {sink_logit.device} but query is on {query.device}: use one device.")


def check_fusion(fusion: Any) -> None:
    """Raise ValueError for a fusion that there is not."""
    if fusion not in FUSIONS:
        raise ValueError(f"fusion must be one of {FUSIONS}, got {fusion!r}.")


def check_gate(gate: Any, query: Tensor) -> None:
    """Raise TypeError or ValueError where `gate` is no floating-point tensor [B, H, T] beside the query."""
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        raise TypeError("gate must be a floating-point Tensor [B, H, T] of logits, or None.")
    check_layout("gate", gate, "[B, H, T]")
    if gate.shape != query.shape[:3]:
        raise ValueError(
            f"gate must be [B, H, T] = {tuple(query.shape[:3])}, got {tuple(gate.shape)}: "
            "one logit for each query token and query head."
        )
    if gate.device != query.device:
        raise ValueError(f"gate is on {gate.device} but query is on {query.device}: move them to one device.")


def check_layout(name: str, x: Tensor, layout: str) -> None:
    """Raise TypeError for a nested (jagged), sparse or quantised tensor."""
    if x.is_nested or x.layout != torch.strided:
        kind = "nested" if x.is_nested else str(x.layout)
        raise TypeError(
            f"{name} is a {kind} tensor: pass a dense one {layout}. Sequences of several lengths are packed into one "
            "row, with segment_ids from segments_from_cu_seqlens, or padded, with those from segments_from_mask."
        )


def _check_tensor(name: str, x: object, layout: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor {layout}, got {type(x).__name__}.")
    check_layout(name, x, layout)
    if x.dim() != 4:
        raise ValueError(f"{name} must be {layout}, got shape {tuple(x.shape)}.")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}: cast it to float16, bfloat16, float32 or float64.")


def check_beside(name: str, x: Tensor, query: Tensor) -> None:
    """Raise TypeError or ValueError where keys or values have another dtype or device than the query."""
    if x.dtype != query.dtype:
        raise TypeError(f"{name} has dtype {x.dtype} but query has {query.dtype}: cast them to one dtype.")
    if x.device != query.device:
        raise ValueError(f"{name} is on {x.device} but query is on {query.device}: move them to one device.")


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Shapes, dtypes and devices of query [B, H, T, D], key and value [B, G, S, D]."""
    _check_tensor("query", query, "[B, H, T, D]")
    _check_tensor("key", key, "[B, G, S, D]")
    _check_tensor("value", value, "[B, G, S, D]")
    of_query, of_key = query.shape, key.shape
    if of_key != value.shape:
        raise ValueError(f"key {tuple(of_key)} and value {tuple(value.shape)} must have one shape [B, G, S, D].")
    check_beside("key", key, query)
    check_beside("value", value, query)
    (batch, heads, queries, dim), (key_batch, groups, keys, key_dim) = of_query, of_key
    if key_batch != batch or key_dim != dim:
        raise ValueError(
            f"query {tuple(of_query)} and key {tuple(of_key)} must agree in batch B and head dim D: "
            "the layout is [B, H, T, D], heads before tokens."
        )
    if 0 in of_query or 0 in of_key:
        raise ValueError(f"query {tuple(of_query)} and key {tuple(of_key)} must not have an empty dimension.")
    if heads % groups:
        raise ValueError(
            f"query has {heads} heads and key has {groups}: "
            "for grouped-query attention the key heads must divide the query heads."
        )
    if queries > keys:
        raise ValueError(
            f"query has {queries} tokens but key has {keys}: queries are aligned with the end of the "
            "keys, so there must be at least as many keys. Is the layout [B, H, T, D], heads before tokens?"
        )


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: PiPattern,
    gate: Tensor | None,
    fusion: str,
    segment_ids: Tensor | None,
) -> None:
    """Raise TypeError or ValueError for arguments that no implementation of `pi_attention` could serve."""
    check_qkv(query, key, value)
    need_pattern(pattern)
    pattern.check_heads(query.shape[1])
    pattern.check_length(key.shape[2])
    check_fusion(fusion)
    if gate is not None:
        check_gate(gate, query)
    if segment_ids is not None:
        if not isinstance(segment_ids, Tensor) or segment_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError("segment_ids must be an int32 Tensor [B, S], or None: see segments_from_mask.")
        check_layout("segment_ids", segment_ids, "[B, S]")
        if segment_ids.shape != (key.shape[0], key.shape[2]):
            raise ValueError(
                f"segment_ids must be [B, S] = {(key.shape[0], key.shape[2])}, got {tuple(segment_ids.shape)}: "
                "one id for each key token, cached ones included."
            )
        if segment_ids.device != query.device:
            raise ValueError(f"segment_ids is on {segment_ids.device}, query on {query.device}: use one device.")
