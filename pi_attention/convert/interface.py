"""π-Attention as an attention implementation of transformers: `attn_implementation="pi"` for its decoders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from pi_attention.cache.contract import RaggedKeys
from pi_attention.cache.near import NearSinks, sinks_among
from pi_attention.convert.config import layer_pattern, settings_of
from pi_attention.convert.extension import SlowerAngles
from pi_attention.models.caching import BoundedCache
from pi_attention.models.continuous import refuse_continuous_batching
from pi_attention.nn.sources import Operator
from pi_attention.ops.api import pi_attention
from pi_attention.ops.paged import Pages, paged_attention
from pi_attention.pattern import PiPattern
from pi_attention.segments import have_values, segments_of_batch

NAME = "pi"

_default: dict[str, Any] = {}


@dataclass(frozen=True)
class ConvertedCall:
    """What a converted model tells its layers in each forward pass."""

    patterns: list[PiPattern]
    """Of the layers."""
    segment_ids: Tensor | None
    """[B, T] of the new tokens, each the position where its segment starts; None for one segment a row."""
    cache: BoundedCache | None
    """Where the keys come from."""
    near: list[NearSinks | None] | None = None
    """Of the layers, beyond the pretrained context."""
    angles: SlowerAngles | None = None
    """Of the layers that see beyond the pretrained context, where the model was extended."""
    arrived: set[int] = field(default_factory=set)
    """The layers that were told."""

    def segments_of_keys(self, layer: int) -> Tensor | None:
        """The segment ids [B, S] of the keys that a layer sees."""
        return self.segment_ids if self.cache is None else self.cache.layers[layer].seen_ids

    def attend(
        self, layer: int, operator: Operator, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None
    ) -> Tensor:
        """The operator, each query with the sinks where its own position puts them; requests of a row apart."""
        self.arrived.add(layer)
        ids = self.segments_of_keys(layer)
        if ids is not None and ids.device != key.device:  # the layers of one model may lie on several GPUs
            ids = ids.to(key.device)
        requests = None if self.cache is None else self.cache.layers[layer]
        if isinstance(requests, RaggedKeys):
            return requests.attend(operator, query, key, value, gate)

        def of_row(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return operator(query, key, value, gate, ids)

        near = None if self.near is None else self.near[layer]
        if near is None or not self.patterns[layer].sinks:
            return of_row(query, key, value)
        tokens, length = query.shape[2], key.shape[2]
        start: Tensor | int = 0 if ids is None else ids
        if self.cache is None:
            is_sink = sinks_among(torch.arange(length, device=key.device)[None], start, self.patterns[layer])
        else:
            storage: Any = self.cache.layers[layer].storage
            length, is_sink, start = storage.length, storage.is_sink(), storage.start_of_last(tokens)
        position = torch.arange(length - tokens, length, device=key.device)[None]
        return near.attend(of_row, query, key, value, near.shift(position, start), is_sink)


def register(pattern: PiPattern | None = None) -> None:
    """Let `attn_implementation="pi"` name π-Attention in transformers, for decoders that use its attention interface.

    Each layer attends to the pattern by fusion="mass" without a gate: one softmax over both bands, so pretrained
    weights keep their meaning. A model's own sliding-window layers stay what they are. See `convert` for a learned gate
    and a cache of bounded memory.

    Args:
        pattern: of models whose config has no `pi_attention`; None leaves that an error.

    Example::

        register(PiPattern(window=512, period=512, skips=16, sinks=4))
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="pi")
    """
    if pattern is not None and not pattern.causal:
        raise ValueError("pattern must be causal for a decoder: causal=True.")
    _default.clear()
    if pattern is not None:
        _default.update(settings_of(pattern))
    register_names()


def register_names() -> None:
    """The part of `register` that needs no pattern."""
    AttentionInterface.register(NAME, attention_forward)
    refuse_continuous_batching(NAME)
    AttentionMaskInterface.register(NAME, padding_of_keys)  # without it transformers drops padding silently


def padding_of_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that `attention_forward` takes: which keys are no padding, [B, 1, 1, kv_length]; None when all are.

    The name and order of the arguments are those of transformers' mask functions.
    """
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise NotImplementedError(
            'attn_implementation="pi" has the queries at the end of the keys, which a static cache has not: '
            "leave cache_implementation out."
        )
    if attention_mask is None:
        return None
    present = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if have_values(present) and bool(present.all()):
        return None
    return present[:, None, None]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    pi_gate: Tensor | None = None,
    pi_call: ConvertedCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: out [B, T, H, D] of query [B, H, T, D], key and value [B, G, S, D].

    Args:
        attention_mask: from `padding_of_keys`.
        position_ids: [B or 1, T]; where they do not go on by one, a new packed document starts.
        softcap: of the scores, as in Gemma 2.
        s_aux: [H], a learned term in the denominator of each head's softmax, as in gpt-oss.
        pi_gate: logits [B, H, T] of a fusion gate, added to λ − μ.
        pi_call: from a model that `convert` made.
        module, scaling, dropout, sliding_window, kwargs: as transformers passes them.
    """
    if kwargs.get("head_mask") is not None or (dropout and module.training):
        what = f"attention dropout ({dropout})" if kwargs.get("head_mask") is None else "head_mask"
        raise NotImplementedError(f'attn_implementation="pi" cannot compute {what}: use another implementation.')
    if not getattr(module, "is_causal", True):
        raise NotImplementedError('attn_implementation="pi" serves causal decoders, and this layer is bidirectional.')
    if attention_mask is not None and (attention_mask.dim() != 4 or attention_mask.shape[1:3] != (1, 1)):
        raise NotImplementedError(
            f'attn_implementation="pi" takes the padding mask [B, S] only, got one of {tuple(attention_mask.shape)}: '
            "the pattern makes the rest."
        )
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise NotImplementedError(f'attn_implementation="pi" needs layer_idx on {type(module).__name__}.')
    if pi_call is not None:
        pattern = pi_call.patterns[layer]
    else:
        pattern = layer_pattern(module.config, layer, sliding_window, _default)
        padding = None if attention_mask is None else attention_mask[:, 0, 0]
        past = key.shape[2] - query.shape[2]
        ids = segments_of_batch(padding, position_ids, past, query.shape[0], query.shape[2])
    options: dict[str, Any] = {"fusion": "mass", "scale": query.shape[-1] ** -0.5 if scaling is None else scaling}
    options |= {"sink_logit": s_aux, "softcap": softcap}

    def operator(
        query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, ids: Tensor | None, pages: Pages | None = None
    ) -> Tensor:
        if pages is not None:
            return paged_attention(query, key, value, pages, pattern, gate=gate, **options)
        return pi_attention(query, key, value, pattern, gate=gate, segment_ids=ids, **options)

    if pi_call is None:
        out = operator(query, key, value, pi_gate, ids)
    else:
        out = pi_call.attend(layer, operator, query, key, value, pi_gate)
    return out.transpose(1, 2).contiguous(), None
