"""Decoding over a paged cache: the keys of many requests lie anywhere in one tensor, and a table says where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pi_attention.ops.api import Fusion, Impl, pi_attention
from pi_attention.ops.checks import check_beside, check_fusion, check_gate, check_scale, check_sink_logit, check_softcap
from pi_attention.ops.fused.attention import is_decoding, paged_decoding, why_not_auto, why_not_triton
from pi_attention.ops.fused.fallback import note_failure
from pi_attention.pattern import PiPattern, need_pattern


@dataclass(frozen=True)
class Pages:
    """Where the keys of N requests lie, each with one query, that of its last key.

    Args:
        table: [N + 1 + ΣS] int32. First where the slots of each request begin in the table, and where the last ends;
            then the slot of every key, request by request, in the order of the text.
        lengths: how many keys each request has.
    """

    table: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], slots: Tensor) -> Pages:
        """Of the number of keys of each request, and the slots [ΣS] of all keys.

        Raises:
            ValueError: there is no request, one has no key, or there are fewer slots than keys.
        """
        if min(lengths, default=0) < 1 or slots.numel() < sum(lengths):
            raise ValueError(
                f"lengths={list(lengths)[:8]} need {sum(lengths)} slots, got {slots.numel()}: give each request at "
                "least one key, and a slot for every key."
            )
        first = len(lengths) + 1
        ends = torch.tensor([*accumulate(lengths, initial=first)], dtype=torch.int32, device=slots.device)
        return cls(torch.cat([ends, slots.to(torch.int32)]), tuple(lengths))

    @property
    def longest(self) -> int:
        """The most keys that a request has."""
        return max(self.lengths)

    @cached_property
    def first(self) -> Tensor:
        """Which of the `longest` keys is the first of each request, [N]; before it is padding."""
        return self.longest - self.table[: len(self.lengths) + 1].long().diff()

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor | None]:
        """Slots [N, longest] of the keys, padded on the left, and their segment ids; None where nothing is padded."""
        ends = self.table[: len(self.lengths) + 1].long()
        place = ends[1:, None] - torch.arange(self.longest, 0, -1, device=ends.device)
        slots = self.table[torch.maximum(place, ends[:-1, None])].long()  # padding repeats the first key
        if len(set(self.lengths)) == 1:
            return slots, None
        return slots, torch.where(place < ends[:-1, None], -1, 0).to(torch.int32)

    def gathered(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [N, G, longest, D] of slots [slots, G, D], padded on the left, and their segment ids."""
        slots, ids = self.padded
        return key[slots].transpose(1, 2), value[slots].transpose(1, 2), ids


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Pages,
    pattern: PiPattern,
    *,
    gate: Tensor | None = None,
    fusion: Fusion = "gate",
    scale: float | None = None,
    sink_logit: Tensor | None = None,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """`pi_attention` of one new token of each of N requests, [N, H, 1, D].

    The kernels read keys and values where they lie, in one launch for all requests. Where they do not serve, keys and
    values are gathered first.

    Args:
        query: [N, H, 1, D].
        key: [slots, G, D], like value.
        value: like key.
        pages: where the keys of each request lie.
        pattern: causal.
        gate: logits [N, H, 1], or None.
        fusion, scale, sink_logit, softcap, impl: see `pi_attention`; "reference" and "blocked" gather.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and the remedy.
        NotImplementedError: impl="triton" cannot serve this call; the message says why.
    """
    _check_call(query, pages, pattern, gate, fusion)
    _check_keys(query, key, value)
    scale = None if scale is None else check_scale(scale)
    softcap = check_softcap(softcap)
    if sink_logit is not None:
        check_sink_logit(sink_logit, query)
    options: Any = {"gate": gate, "fusion": fusion, "scale": scale, "impl": impl}
    options |= {"sink_logit": sink_logit, "softcap": softcap}
    if _kernels_serve(query, key, value, gate, pattern, sink_logit, impl):
        fused: Any = {"gate": gate, "mass": gate is None or fusion == "mass"}
        fused |= {"sink_logit": sink_logit, "softcap": softcap}
        fused["scale"] = query.shape[-1] ** -0.5 if scale is None else scale
        try:
            return paged_decoding(query, key, value, pages.table, pages.longest, pattern, **fused)
        except Exception as error:
            if impl == "triton" or not note_failure(query, error):
                raise
    keys, values, ids = pages.gathered(key, value)
    return pi_attention(query, keys, values, pattern, segment_ids=ids, **options)


def _check_call(query: Tensor, pages: Pages, pattern: PiPattern, gate: Tensor | None, fusion: str) -> None:
    """Raise for a query, gate or pattern that neither the kernels nor gathered keys could serve."""
    requests = len(pages.lengths)
    if not isinstance(query, Tensor):
        raise TypeError(f"query must be a Tensor [N, H, 1, D], got {type(query).__name__}.")
    if query.dim() != 4 or query.shape[0] != requests or query.shape[2] != 1:
        raise ValueError(
            f"query must be [N, H, 1, D] with N = {requests}, the requests of pages, got {tuple(query.shape)}: "
            "one new token of each request."
        )
    need_pattern(pattern)
    pattern.check_heads(query.shape[1])
    if not pattern.causal:
        raise ValueError(
            "pattern has causal=False, and a request's new token has no later keys to see: pass a causal pattern."
        )
    check_fusion(fusion)
    if gate is not None:
        check_gate(gate, query)


def _check_keys(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise for keys and values beside which a kernel would read: their slots are checked by nobody on a GPU."""
    for name, x in (("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor [slots, G, D], got {type(x).__name__}.")
        check_beside(name, x, query)
    heads, dim, of_slot = query.shape[1], query.shape[3], key.shape[1:]  # one store may have more slots than the other
    if key.dim() != 3 or of_slot != value.shape[1:] or of_slot[1] != dim or not of_slot[0] or heads % of_slot[0]:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} must be [slots, G, D], with the query's D = {dim} "
            f"and G dividing its {heads} heads: slots before heads."
        )


def _kernels_serve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    pattern: PiPattern,
    sink_logit: Tensor | None,
    impl: Impl,
) -> bool:
    if impl not in ("auto", "triton") or torch.is_autocast_enabled(query.device.type):
        return False
    reason = why_not_triton(query) if impl == "triton" else why_not_auto(query)
    decodes = is_decoding(query, key.transpose(0, 1)[None], value, gate, pattern, sink_logit)
    if impl == "triton" and (reason is not None or not decodes):
        reason = reason or "many heads of a group, or gradients, are asked for"
        raise NotImplementedError(f'impl="triton" cannot serve this call: {reason}. Use impl="auto" or "blocked".')
    return reason is None and decodes
