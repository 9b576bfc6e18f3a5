"""Multi-head π-Attention as a layer: projections, rotary embedding, gate, operator, cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pi_attention.cache.contract import KeyValueCache
from pi_attention.nn.gate import FusionGate, neutral_bias
from pi_attention.nn.layers import SinkLogit
from pi_attention.nn.rope import apply_rotary, rotary_angles
from pi_attention.nn.sources import KeySource, NewKeys
from pi_attention.ops.api import Fusion, Impl, PiAux, pi_attention
from pi_attention.ops.checks import FUSIONS, check_softcap
from pi_attention.ops.paged import Pages, paged_attention
from pi_attention.pattern import PiPattern, need_int, need_pattern


@dataclass(frozen=True)
class GateOptions:
    """The fusion gate of a layer.

    Args:
        fusion: "gate" (the paper's) or "mass" (starts as one softmax over both bands).
        learned: False has no gate: one softmax over both bands.
        features: the gate sees only the first so many features of the hidden state; None sees all.
    """

    fusion: Fusion = "gate"
    learned: bool = True
    features: int | None = None


class PiAttention(nn.Module):
    """Multi-head π-Attention (arXiv 2511.10696) over hidden states [B, T, hidden_size].

    Args:
        hidden_size: features in and out.
        num_heads: query heads H.
        pattern: which keys each query sees.
        num_kv_heads: key/value heads G, dividing H (grouped-query attention); H when None.
        head_dim: D; hidden_size / num_heads when None.
        gate: the fusion gate.
        rope_theta: base of the rotary embedding; None for no positions.
        qk_norm: RMSNorm over each head's query and key (arXiv 2010.04245).
        sink_logit: learn a term in the denominator of each head's softmax; see `pi_attention`.
        softcap: of the scores, as in Gemma 2; None for none.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or contradicts another; the message names the remedy.

    Example::

        attention = PiAttention(512, num_heads=8, pattern=PiPattern(window=128, period=128, skips=16))
        y = attention(x)  # [B, T, 512]
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        pattern: PiPattern,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        gate: GateOptions | None = None,
        rope_theta: float | None = 10000.0,
        qk_norm: bool = False,
        sink_logit: bool = False,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        need_pattern(pattern)
        need_int("hidden_size", hidden_size, 1, "features of a token")
        need_int("num_heads", num_heads, 1, "query heads")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        need_int("num_kv_heads", num_kv_heads, 1, "key/value heads, or None for as many as query heads")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}.")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} is no multiple of num_heads={num_heads}: give head_dim.")
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        need_int("head_dim", self.head_dim, 1, "features of a head, or None for hidden_size / num_heads")
        if rope_theta is not None and (rope_theta <= 0 or self.head_dim % 2):
            raise ValueError(
                f"a rotary embedding turns pairs of features by a positive base, got head_dim={self.head_dim} and "
                f"rope_theta={rope_theta}: take an even head_dim and a positive base, or rope_theta=None."
            )
        gate = GateOptions() if gate is None else gate
        if not isinstance(gate, GateOptions):
            raise TypeError(f"gate must be a GateOptions, got {gate!r}: GateOptions(fusion, learned, features).")
        if gate.fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {FUSIONS}, got {gate.fusion!r}.")
        pattern.check_heads(num_heads)
        self.pattern = pattern
        self.fusion = gate.fusion
        self.rope_theta = rope_theta
        self.softcap = check_softcap(softcap)
        self.impl: Impl = "auto"
        self.aux: list[PiAux] | None = None  # filled while record_aux watches
        self.source: KeySource = NewKeys()  # of a sharded sequence: see pi_attention.distributed.attach
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.sink_logit = SinkLogit(num_heads) if sink_logit else None
        has_gate = gate.learned and pattern.skips != 0
        bias = neutral_bias(pattern, gate.fusion)
        self.gate = FusionGate(hidden_size, num_heads, bias=bias, gate_features=gate.features) if has_gate else None

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        segment_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """[B, T, hidden_size] -> [B, T, hidden_size].

        Args:
            hidden_states: of the new tokens.
            position_embeddings: cos and sin [B or 1, T, D]; computed from the positions in the sequence when None.
            segment_ids: [B, S] for all S tokens so far, the cached ones included; see `pi_attention`. With a cache
                those of the new tokens are enough: see `KeyValueCache.extend`.
            cache: holds the keys and values of earlier tokens, and is updated.

        Raises:
            ValueError: the hidden states are not [B, T, hidden_size].
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.q_proj.in_features:
            raise ValueError(
                f"hidden_states must be [B, T, hidden_size = {self.q_proj.in_features}], "
                f"got shape {tuple(hidden_states.shape)}."
            )
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))  # [B, T, heads, D]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            weights = self.q_norm.weight.dtype  # autocast projects in another one, and a norm of two dtypes is slow
            query, key = self.q_norm(query.to(weights)), self.k_norm(key.to(weights))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # seen as [B, heads, T, D], not copied
        if position_embeddings is None and self.rope_theta is not None:
            position = (
                self.source.position(cache) + torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
            )
            position_embeddings = rotary_angles(position, self.head_dim, self.rope_theta)
        if position_embeddings is not None:
            query, key = apply_rotary(query, *position_embeddings), apply_rotary(key, *position_embeddings)
        query, key = query.to(value.dtype), key.to(value.dtype)
        gate = None if self.gate is None else self.gate(hidden_states)
        once = self.aux is not None  # one record a call
        out = self.source.attend(self.operator, query, key, value, gate, segment_ids, cache=cache, once=once)
        if self.sink_logit is not None and not out.shape[2]:  # a rank without tokens gives a zero gradient, not none
            out = out + self.sink_logit().sum().to(out.dtype)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def operator(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None,
        segment_ids: Tensor | None,
        pages: Pages | None = None,
    ) -> Tensor:
        """The attention itself, an `Operator`: [B, H, T, D] of query, key, value, gate logits and ids of the keys."""
        options: dict[str, Any] = {"gate": gate, "fusion": self.fusion, "impl": self.impl} | self.scores()
        if pages is not None and self.aux is None:
            return paged_attention(query, key, value, pages, self.pattern, **options)
        if pages is not None:
            key, value, segment_ids = pages.gathered(key, value)
        options["segment_ids"] = segment_ids
        if self.aux is None:
            return pi_attention(query, key, value, self.pattern, **options)
        out, aux = pi_attention(query, key, value, self.pattern, **options, return_aux=True)
        self.aux.append(PiAux(*(x.detach() for x in aux)))
        return out

    def scores(self) -> dict[str, Any]:
        """What the layer does to scores, as arguments of the operator."""
        return {"sink_logit": None if self.sink_logit is None else self.sink_logit(), "softcap": self.softcap}


@contextmanager
def record_aux(model: nn.Module) -> Iterator[dict[str, list[PiAux]]]:
    """Collect gates and log-sum-exps of every `PiAttention` in `model`, by module name, one `PiAux` a call.

    Within another `record_aux` of the same layers, that one goes on afterwards.

    Example::

        with record_aux(model) as aux:
            model(input_ids)
        gate = aux["model.layers.0.self_attn"][0].gate  # [B, H, T]
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PiAttention)}
    records: dict[str, list[PiAux]] = {name: [] for name in layers}
    before = {name: layer.aux for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.aux = records[name]
    try:
        yield records
    finally:
        for name, layer in layers.items():
            layer.aux = before[name]
