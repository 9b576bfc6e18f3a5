"""Give a pretrained Hugging Face decoder π-Attention: a pattern, a learned gate, a decoding cache of bounded memory."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pi_attention.models.caching import BoundedGeneration, PiCache
from pi_attention.models.card import WithCard
from pi_attention.models.interface import (
    NAME,
    SETTINGS,
    ConvertedCall,
    layer_pattern,
    register_names,
    settings_of,
)
from pi_attention.models.modeling_pi import initialise, segments_of_batch, static_segments
from pi_attention.models.near_sinks import NearSinks
from pi_attention.models.rotary import keep_in_fp32
from pi_attention.models.static_cache import PiStaticCache
from pi_attention.models.undo import undone_on_failure
from pi_attention.nn.gate import FusionGate
from pi_attention.ops.checks import DTYPES
from pi_attention.pattern import PiPattern, need_pattern

MOVING = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on the length."""
LOADER = "AutoModelForCausalLM.from_pretrained"


class PiConvertedConfig(PretrainedConfig):
    """A decoder of transformers, and what its layers attend to.

    Args:
        text_config: of the decoder, with the pattern in its `pi_attention`.
        gate: learn a fusion gate in each converted layer.
    """

    model_type = "pi_converted"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    text_config: Any

    def __init__(
        self, text_config: PretrainedConfig | dict[str, Any] | None = None, gate: bool = True, **kwargs: Any
    ) -> None:
        if text_config is None:
            text_config = {"model_type": "llama", SETTINGS: settings_of(PiPattern(512, 512, 16))}
        if isinstance(text_config, dict):
            text_config = CONFIG_MAPPING[text_config["model_type"]](**text_config)
        self.text_config = text_config
        self.gate = gate
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            kwargs.setdefault(name, getattr(text_config, name, None))
        super().__init__(**kwargs)

    def patterns(self) -> list[PiPattern]:
        """The pattern of every layer."""
        config = self.text_config
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
            kinds = ["sliding_attention"] * config.num_hidden_layers  # as in Mistral
        windows = [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
        return [layer_pattern(config, layer, window) for layer, window in enumerate(windows)]


class PiConvertedForCausalLM(WithCard, BoundedGeneration, PreTrainedModel, GenerationMixin):
    """A causal language model of transformers, `model`, whose layers attend by π-Attention with fusion="mass"."""

    config_class = PiConvertedConfig
    config: PiConvertedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = False
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]

    def __init__(self, config: PiConvertedConfig, model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        register_names()
        if model is None:
            model = AutoModelForCausalLM.from_config(config.text_config, attn_implementation=NAME)
        else:
            for module in model.modules():
                module._is_hf_initialized = True  # its weights are pretrained, however they came in
        self.model = model
        config.text_config._attn_implementation = NAME  # super().__init__ chose one for both configs
        self._no_split_modules = model._no_split_modules
        _initialise_gates_of(model)
        self._patterns = config.patterns()
        self._add_gates()
        self.post_init()

    def _add_gates(self) -> None:
        """A `pi_gate` in each layer with skips; a hook hands its logits to the attention function."""
        config, patterns = self.config.text_config, self._patterns
        found: set[int] = set()
        for module in self.model.modules():
            if not (self.config.gate and _takes_gate(module)):
                continue
            layer: Any = module.layer_idx
            if patterns[layer].skips == 0:
                continue
            found.add(layer)
            gate = FusionGate(config.hidden_size, config.num_attention_heads)
            module.pi_gate = gate.to(module.q_proj.weight.device, _compute_dtype(self.model, module.q_proj))
            module.register_forward_pre_hook(_pass_gate, with_kwargs=True)
        missed = [layer for layer, pattern in enumerate(patterns) if pattern.skips != 0 and layer not in found]
        if self.config.gate and missed:
            raise NotImplementedError(f"no attention module with q_proj in layer {missed[0]}: convert with gate=False.")

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
        cache = super().new_cache()
        context = getattr(self.config.text_config, "max_position_embeddings", None)
        frequencies = _rotary_frequencies(self.model, len(cache.layers))
        if context is not None and frequencies is not None:
            cache.keep_sinks_near(context, frequencies)
        return cache

    def _sinks_beyond(self, length: int, cache: PiCache | PiStaticCache | None) -> list[NearSinks | None] | None:
        """How the sinks of each layer move once `length` tokens exceed the pretrained context; None before."""
        context = getattr(self.config.text_config, "max_position_embeddings", None)
        if context is None or length <= context or isinstance(cache, PiStaticCache):
            return None
        filled = cache if isinstance(cache, PiCache) and any(layer.near for layer in cache.layers) else self.new_cache()
        near = [layer.near for layer in filled.layers]
        if isinstance(cache, PiCache):
            for layer, of_layer in zip(cache.layers, near, strict=True):
                layer.near = of_layer  # of a cache that was not made by new_cache
        return near

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but keep the frequencies of rotary embeddings in fp32."""
        rotary = [module for module in self.modules() if type(module).__name__.endswith("RotaryEmbedding")]
        before = [dict(module.named_buffers(recurse=False)) for module in rotary]
        super()._apply(fn, recurse)
        for module, buffers in zip(rotary, before, strict=True):
            keep_in_fp32(module, buffers)
        return self

    def _prepare_static_cache(
        self, cache_implementation: str, batch_size: int, max_cache_len: int, *args: Any, **kwargs: Any
    ) -> PiStaticCache:
        context = getattr(self.config.text_config, "max_position_embeddings", max_cache_len)
        if max_cache_len > context and any(pattern.sinks for pattern in self.config.patterns()):
            raise NotImplementedError(
                f'cache_implementation="static" with sinks serves the pretrained context of {context} tokens only, and '
                f"{max_cache_len} were asked for: leave it out, so that the sinks can move along."
            )
        return super()._prepare_static_cache(cache_implementation, batch_size, max_cache_len, *args, **kwargs)

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
        use_cache = self.config.text_config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        if not isinstance(past_key_values, PiCache | PiStaticCache | None):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}: leave it out, or pass "
                "model.new_cache(), which keeps what the patterns see."
            )
        if isinstance(past_key_values, PiStaticCache):
            shape = like.shape[0], like.shape[1]
            segment_ids = static_segments(past_key_values, segment_ids, attention_mask, position_ids, shape)
            attention_mask = like.new_ones(len(like), 1, 1, 1)  # four dimensions: transformers makes no mask of its own
        elif segment_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            segment_ids = segments_of_batch(attention_mask, position_ids, past, *like.shape[:2])
        near = None
        if any(pattern.sinks for pattern in self._patterns):
            past = past_key_values.get_seq_length() if isinstance(past_key_values, PiCache) else 0
            near = self._sinks_beyond(past + like.shape[1], past_key_values)
        if isinstance(past_key_values, PiCache):
            past_key_values.begin(segment_ids)
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            pi_call=ConvertedCall(self._patterns, segment_ids, past_key_values, near),
            **kwargs,
        )


def _compute_dtype(model: PreTrainedModel, projection: nn.Module) -> torch.dtype:
    """What a layer computes in: the dtype of its weights, unless they are quantised; then that of the embeddings."""
    embeddings: Any = model.get_input_embeddings()
    weights: Any = projection.weight
    for dtype in (weights.dtype, embeddings.weight.dtype, model.config.dtype):
        if dtype in DTYPES:
            return dtype
    return torch.float32


def _takes_gate(module: nn.Module) -> bool:
    """Whether it is the attention of a layer, of the make that a gate can be added to."""
    return getattr(module, "layer_idx", None) is not None and hasattr(module, "q_proj")


def _rotary_frequencies(model: PreTrainedModel, layers: int) -> list[Tensor | None] | None:
    """Inverse frequencies of each layer's rotary embedding, None for a layer without.

    None instead of the list where keys cannot be moved: the frequencies depend on the length, or the features are
    paired in another way than in Llama.
    """
    halves = getattr(sys.modules[type(model).__module__], "rotate_half", None)
    if halves is None or halves(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        return None
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * layers
    rotated = getattr(model.config, "no_rope_layers", None) or [1] * layers  # in SmolLM3, 0 is a layer without
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding") and getattr(module, "rope_type", "") not in MOVING:
            names = [name if hasattr(module, name) else "inv_freq" for name in (f"{kind}_inv_freq" for kind in kinds)]
            if hasattr(module, names[0]):
                found = zip(names, rotated, strict=True)
                return [getattr(module, name).float() if turned else None for name, turned in found]
    return None


def _initialise_gates_of(model: PreTrainedModel) -> None:
    """The gates lie in models that initialise what a checkpoint lacks by rules of their own: teach them the gates'."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part._init_weights = partial(initialise, part._init_weights)


def _pass_gate(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden_states = args[0] if args else kwargs["hidden_states"]
    gate: Any = module.pi_gate
    return args, kwargs | {"pi_gate": gate(hidden_states)}


def convert(
    model: PreTrainedModel, pattern: PiPattern, *, gate: bool = True, layers: list[int] | None = None
) -> PiConvertedForCausalLM:
    """Give a pretrained causal language model π-Attention; its weights are shared, not copied.

    With the same weights the first forward is sparse softmax attention over the pattern: fusion="mass", whose learned
    gate starts at a = 0. Layers that have a sliding window of their own keep it. Model and config are changed in
    place, unless an error is raised: use what is returned.

    Args:
        model: a decoder of transformers that uses its attention interface (Llama, Qwen, Mistral, Gemma, SmolLM …).
        pattern: causal; of the converted layers.
        gate: add a learned fusion gate to each converted layer, saved with the model.
        layers: indices of the layers to convert; None converts all that attend to everything.

    Returns:
        A model for training, `generate`, `save_pretrained`; `AutoModelForCausalLM.from_pretrained` restores it once
        `pi_attention.convert` is imported.

    Raises:
        TypeError: the model is no model of transformers, or the pattern no pattern.
        ValueError: the model is no causal language model, or converted already, the pattern is bidirectional, or a
            layer does not exist.
        NotImplementedError: the model does not use transformers' attention interface.

    Example::

        model = convert(AutoModelForCausalLM.from_pretrained(name), PiPattern(512, 512, 16, sinks=4))
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel, got {type(model).__name__}: load it by {LOADER}.")
    if isinstance(model, PiConvertedForCausalLM) or any(hasattr(module, "pi_gate") for module in model.modules()):
        raise ValueError("model is of an earlier conversion: load the pretrained model again, then convert.")
    if not model.can_generate():
        raise ValueError(f"model is a {type(model).__name__}, no causal language model: load it by {LOADER}.")
    need_pattern(pattern)
    if not pattern.causal:
        raise ValueError("pattern must be causal for a decoder: causal=True.")
    config = model.config
    count = getattr(config, "num_hidden_layers", 0)
    wrong = [layer for layer in layers or [] if not 0 <= layer < count]
    if wrong:
        raise ValueError(f"layers={layers} holds {wrong[0]}, but the model has layers 0 to {count - 1}.")
    pattern.check_heads(config.num_attention_heads)
    if not getattr(type(model), "_supports_attention_backend", False):
        raise NotImplementedError(f"{type(model).__name__} does not use transformers' attention interface.")
    if gate and pattern.skips != 0 and not any(map(_takes_gate, model.modules())):
        raise NotImplementedError(f"{type(model).__name__} has no attention with q_proj: convert with gate=False.")
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and pattern.reach is not None and pattern.reach > context:
        warnings.warn(
            f"{pattern} reaches {pattern.reach} tokens back, further than the context of {context} that the model was "
            "trained for: beyond it, skips show it lags that it does not know.",
            stacklevel=2,
        )
    register_names()
    with undone_on_failure(model):
        setattr(config, SETTINGS, settings_of(pattern, layers))
        model.set_attn_implementation(NAME)
        converted = PiConvertedForCausalLM(PiConvertedConfig(config, gate=gate), model)
        converted.generation_config = model.generation_config
        return converted.train(model.training)


AutoConfig.register("pi_converted", PiConvertedConfig, exist_ok=True)
AutoModelForCausalLM.register(PiConvertedConfig, PiConvertedForCausalLM, exist_ok=True)
