"""The π-Transformer for Hugging Face: PiModel and PiForCausalLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from pi_attention.models.attention_map import AttentionMap, PiSelfAttention
from pi_attention.models.cache_argument import CACHE, STAYING, takes_cache
from pi_attention.models.caching import BoundedCache, PiCache
from pi_attention.models.card import WithCard
from pi_attention.models.configuration_pi import PiConfig
from pi_attention.models.generation import BoundedGeneration
from pi_attention.models.initialisation import initialise
from pi_attention.models.inputs import check_cache, check_inputs, without_padding
from pi_attention.models.library_cache import LibraryCache, known_cache
from pi_attention.models.loss import sliced_loss
from pi_attention.models.rotary import PiRotaryEmbedding
from pi_attention.nn.attention import GateOptions, PiAttention
from pi_attention.nn.layers import SwiGLU
from pi_attention.nn.sources import NewKeys
from pi_attention.ops.api import Impl
from pi_attention.pattern import PiPattern
from pi_attention.segments import starts_of_batch

IMPLEMENTATION_OF: dict[str, Impl] = {"eager": "reference", "sdpa": "auto"}
"""transformers' attention implementations, and which of ours serves them."""


class PiDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: PiConfig, pattern: PiPattern, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = PiSelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            pattern,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            gate=GateOptions(config.fusion, config.gate, config.gate_features),
            rope_theta=config.rope_theta,
            qk_norm=config.qk_norm,
            sink_logit=config.sink_logit,
            softcap=config.softcap,
        )
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        segment_ids: Tensor | None = None,
        past_key_values: BoundedCache | LibraryCache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]."""
        cache = None if past_key_values is None else past_key_values.storage(self.layer_idx)
        hidden_states = hidden_states + self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            segment_ids=segment_ids,
            cache=cache,
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class PiPreTrainedModel(WithCard, PreTrainedModel):
    """Weight initialisation and what transformers needs to know of the architecture."""

    config_class = PiConfig
    config: PiConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["PiDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = STAYING
    _supports_sdpa = True
    _supports_attention_backend = False
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type]] = {"hidden_states": PiDecoderLayer, "attentions": AttentionMap}

    def _init_weights(self, module: nn.Module) -> None:
        initialise(super()._init_weights, module)

    def post_init(self) -> None:
        """As of transformers; where no attention can be split, no head is, which may be tied to the embeddings."""
        super().post_init()
        if self.config.base_model_tp_plan is None:
            self.tp_plan = None


class PiModel(PiPreTrainedModel):
    """Embeddings, blocks and a final norm: token ids to hidden states."""

    def __init__(self, config: PiConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        patterns = config.patterns()
        self.layers = nn.ModuleList(PiDecoderLayer(config, pattern, i) for i, pattern in enumerate(patterns))
        self._patterns = patterns
        self._sinks = max(pattern.sinks for pattern in patterns)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = PiRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _attentions(self) -> Iterator[PiAttention]:
        return (cast(PiDecoderLayer, layer).self_attn for layer in self.layers)

    def _is_sharded(self) -> bool:
        return any(not isinstance(attention.source, NewKeys) for attention in self._attentions())

    def _choose_implementation(self) -> None:
        name = self.config._attn_implementation or "sdpa"
        if name not in IMPLEMENTATION_OF:
            raise ValueError(
                f"attn_implementation={name!r} would not compute π-Attention: "
                f"use one of {sorted(IMPLEMENTATION_OF)} (eager is the dense reference)."
            )
        for attention in self._attentions():
            attention.impl = IMPLEMENTATION_OF[name]

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, hidden] of token ids [B, T].

        Args:
            input_ids: [B, T]; or inputs_embeds [B, T, hidden].
            inputs_embeds: instead of input_ids.
            attention_mask: [B, cached + T], 0 for padding on either side; padding between tokens parts them.
            position_ids: [B or 1, T]; where they do not go on by one, a new document starts.
            past_key_values: cache of earlier tokens; created when None and use_cache.
            use_cache: return a cache.
            segment_ids: [B, cached + T] int32 (see `pi_attention`), instead of deriving them from mask and positions.
            kwargs: passed on to the layers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, not both or none.")
        least = 0 if self._is_sharded() else 1
        check_inputs(input_ids, inputs_embeds, attention_mask, position_ids, segment_ids, least=least)
        next(self._attentions()).source.check_batch(attention_mask, position_ids)
        segment_ids = without_padding(segment_ids, attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, tokens = inputs_embeds.shape[:2]
        if use_cache and past_key_values is None:
            past_key_values = PiCache(self._patterns)
        cache = None
        if past_key_values is not None:
            check_cache(past_key_values, self._patterns)
            cache = known_cache(past_key_values, self._sinks)
        past = 0 if cache is None else cache.get_seq_length()
        self._choose_implementation()

        if cache is not None:
            segment_ids = cache.segments(segment_ids, attention_mask, position_ids, (batch, tokens))
        else:
            segment_ids = starts_of_batch(segment_ids, attention_mask, position_ids, 0, batch, tokens)
        if position_ids is None:
            first = next(self._attentions()).source.position() if self._is_sharded() else past
            position_ids = (torch.arange(tokens, device=inputs_embeds.device) + first)[None]
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)

        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                segment_ids=segment_ids,
                **{CACHE: cache},  # the name under which gradient checkpointing leaves it out
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE: past_key_values if use_cache else None}
        )


class PiForCausalLM(BoundedGeneration, PiPreTrainedModel, GenerationMixin):
    """PiModel with a language-modelling head."""

    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PiConfig) -> None:
        if not all(pattern.causal for pattern in config.patterns()):
            raise ValueError(
                "PiForCausalLM needs causal patterns: a bidirectional one sees the tokens that it predicts. "
                "Set causal=True, or use PiForMaskedLM."
            )
        super().__init__(config)
        self.model = PiModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab], and with labels [B, T] (−100 ignored) the mean loss of predicting each next token.

        With labels and `config.loss_slice`, the loss alone.

        Args:
            labels: [B, T] token ids; shifted here, unless `shift_labels` gives them shifted.
            logits_to_keep: compute the logits of the last so many tokens, or of these positions; 0 is all.
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, kwargs: see `PiModel`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, keep]
        size, logits, loss = self.config.loss_slice, None, None
        if labels is not None and size is not None:
            given = {name: kwargs.get(name) for name in ("shift_labels", "num_items_in_batch")}
            loss = sliced_loss(self.lm_head, hidden, labels, size, **given)
        else:
            logits = self.lm_head(hidden)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )
