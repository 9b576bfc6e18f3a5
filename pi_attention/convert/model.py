"""A pretrained decoder of transformers whose layers attend by π-Attention: what `convert` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache

from pi_attention.cache.near import NearSinks
from pi_attention.convert.config import PiConvertedConfig
from pi_attention.convert.extension import SlowerAngles, check_extension, far_layers, let_turn, slower_rotary
from pi_attention.convert.gates import add_gates, initialise_gates_of
from pi_attention.convert.interface import NAME, ConvertedCall, register_names
from pi_attention.convert.rotary import layer_frequencies, rotary_modules
from pi_attention.models.cache_argument import CACHE, STAYING, takes_cache
from pi_attention.models.caching import BoundedCache, PiCache, PiStaticCache
from pi_attention.models.card import WithCard
from pi_attention.models.generation import BoundedGeneration
from pi_attention.models.inputs import check_cache, check_inputs, without_padding
from pi_attention.models.ragged import RaggedCall
from pi_attention.models.rotary import keep_in_fp32
from pi_attention.segments import starts_of_batch

IN_USE: WeakSet[PiConvertedForCausalLM] = WeakSet()
"""Converted models that are there. Each shares its configuration with the pretrained model."""


class PiConvertedForCausalLM(WithCard, BoundedGeneration, PreTrainedModel, GenerationMixin):
    """A causal language model of transformers, `model`, whose layers attend by π-Attention with fusion="mass"."""

    config_class = PiConvertedConfig
    config: PiConvertedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = False
    _skip_keys_device_placement: ClassVar[list[str]] = STAYING

    def __init__(self, config: PiConvertedConfig, model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        register_names()
        if model is None:
            model = AutoModelForCausalLM.from_config(config.text_config, attn_implementation=NAME)
        else:
            for module in model.modules():
                module._is_hf_initialized = True  # its weights are pretrained, however they came in
        self.model = model
        IN_USE.add(self)
        config.text_config._attn_implementation = NAME  # super().__init__ chose one for both configs
        self._no_split_modules = model._no_split_modules
        initialise_gates_of(model)
        self._patterns = config.patterns()
        if config.gate:
            add_gates(model, self._patterns)
        self._near: list[NearSinks | None] | None = None
        self._far_layers: list[int] = []  # those that turn slower
        self.slower_rotary: Any = None
        if config.extend_to is not None:
            check_extension(config.extend_to, config.text_config, self._patterns)
            self._far_layers = far_layers(self._patterns, config.text_config.max_position_embeddings)
            let_turn(model, self._far_layers)
            self.slower_rotary = slower_rotary(model, config.extend_to)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.set_output_embeddings(new_embeddings)

    def new_cache(self) -> PiCache:
        """An empty decoding cache; beyond the pretrained model's context its sinks move along with the text.

        So a text of any length can be streamed through it, in calls of any number of tokens.
        """
        cache = PiCache(self._patterns)
        cache.keep_sinks_near(self._near_sinks())
        return cache

    def _near_sinks(self) -> list[NearSinks | None]:
        """How the sinks of each layer move beyond the context that it knows; None where they stay."""
        if self._near is None:
            self._near = self._found_near_sinks()
        return self._near

    def _found_near_sinks(self) -> list[NearSinks | None]:
        known = self.sinks_move_beyond
        frequencies = None if known is None else layer_frequencies(self.model, len(self._patterns))
        if known is None or frequencies is None:
            return [None] * len(self._patterns)
        near = [
            NearSinks(known, of_layer) if pattern.sinks and of_layer is not None else None
            for pattern, of_layer in zip(self._patterns, frequencies, strict=True)
        ]
        if self.config.extend_to is not None:
            slower = NearSinks(self.config.extend_to, self.slower_rotary.inv_freq.float())
            for layer in self._far_layers:
                near[layer] = slower if near[layer] is not None else None
        return near

    @property
    def _context(self) -> int | None:
        """Tokens that the pretrained model knows."""
        return getattr(self.config.text_config, "max_position_embeddings", None)

    @property
    def sinks_move_beyond(self) -> int | None:
        """Tokens beyond which sinks move along with the text, the pretrained context; None where they stay."""
        return self._context if any(pattern.sinks for pattern in self._patterns) else None

    def _angles(self, position_ids: Tensor | None, cache: BoundedCache | None, new: Tensor) -> SlowerAngles | None:
        """Those of the layers that turn slower, for new tokens [B, T, …]."""
        if self.slower_rotary is None:
            return None
        if position_ids is None:  # as the models of transformers count
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(new.shape[1], device=new.device)[None] + past
        return SlowerAngles(self.slower_rotary, self._far_layers, position_ids)

    def _moving_sinks(
        self, cache: BoundedCache | None, tokens: int, position_ids: Tensor | None
    ) -> list[NearSinks | None] | None:
        """How the sinks of each layer move for so many new tokens.

        None within the pretrained context, and for many requests, whose own positions tell: that cache moves them.
        """
        context = self.sinks_move_beyond
        if context is None:
            return None
        if isinstance(cache, RaggedCall) and position_ids is not None:
            if int(position_ids.max()) >= context:
                cache.move_sinks(self._near_sinks(), position_ids)
            return None
        if cache is not None and not cache.moves_sinks:
            return None
        if (0 if cache is None else cache.get_seq_length()) + tokens <= context:
            return None
        near = [] if cache is None else [layer.near for layer in cache.layers]
        if not any(near):  # no cache, or one that new_cache did not make
            near = self._near_sinks()
            for layer, of_layer in zip([] if cache is None else cache.layers, near, strict=False):
                layer.near = of_layer
        return near

    def _need_nothing_told(self, beyond: bool, segment_ids: Tensor | None) -> None:
        """Raise NotImplementedError where the layers had to be told something, and none was."""
        what = f"{type(self.model).__name__} hands its attention no further arguments, so that no layer can be told"
        if beyond:
            raise NotImplementedError(
                f"{what} how to see beyond the pretrained context of {self._context}: give shorter texts, and no "
                "extend_to."
            )
        if segment_ids is not None and bool((segment_ids != segment_ids[:, :1]).any()):
            raise NotImplementedError(f"{what} where documents begin: give one document a row.")

    def check_batching(self) -> None:
        """See `BoundedGeneration`: the layers must be told which tokens are of one request."""
        documents = torch.arange(2, device=self.device)[None]
        self.eval()  # as the manager does
        with torch.no_grad():
            self(input_ids=torch.zeros_like(documents), segment_ids=documents, use_cache=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but keep the frequencies of rotary embeddings in fp32."""
        rotary = list(rotary_modules(self))
        before = [dict(module.named_buffers(recurse=False)) for module in rotary]
        super()._apply(fn, recurse)
        self._near = None  # its frequencies lie where they lay
        for module, buffers in zip(rotary, before, strict=True):
            keep_in_fp32(module, buffers)
        return self

    def _prepare_static_cache(
        self, cache_implementation: str, batch_size: int, max_cache_len: int, *args: Any, **kwargs: Any
    ) -> PiStaticCache:
        context = self.sinks_move_beyond
        if context is not None and max_cache_len > context:
            raise NotImplementedError(
                f'cache_implementation="static" with sinks serves the pretrained context of {context} tokens only, and '
                f"{max_cache_len} were asked for: leave it out, so that the sinks can move along."
            )
        return super()._prepare_static_cache(cache_implementation, batch_size, max_cache_len, *args, **kwargs)

    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the forward of the converted model; the cache that it creates is a `PiCache`.

        Args:
            segment_ids: [B, cached + T] int32 (see `pi_attention`), instead of deriving them from mask and positions.
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache, kwargs: as
                those of the converted model.
        """
        like = input_ids if input_ids is not None else inputs_embeds
        if like is None:
            raise ValueError("pass either input_ids or inputs_embeds.")
        check_inputs(input_ids, inputs_embeds, attention_mask, position_ids, segment_ids)
        given = segment_ids
        segment_ids = without_padding(segment_ids, attention_mask)
        use_cache = self.config.text_config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        if not isinstance(past_key_values, BoundedCache | None):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}: leave it out, or pass "
                "model.new_cache(), which keeps what the patterns see."
            )
        if past_key_values is not None:
            check_cache(past_key_values, self._patterns)
        batch, tokens = like.shape[:2]
        near = self._moving_sinks(past_key_values, tokens, position_ids)
        angles = self._angles(position_ids, past_key_values, like)
        if past_key_values is not None:
            segment_ids = past_key_values.segments(segment_ids, attention_mask, position_ids, (batch, tokens))
            past_key_values.tell(segment_ids)
            attention_mask = past_key_values.library_mask(attention_mask, like)
        else:
            segment_ids = starts_of_batch(segment_ids, attention_mask, position_ids, 0, batch, tokens)
        call = ConvertedCall(self._patterns, segment_ids, past_key_values, near, angles)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            pi_call=call,
            **{CACHE: past_key_values},
            **kwargs,
        )
        if not call.arrived:
            self._need_nothing_told(near is not None or angles is not None, given)
        return out
