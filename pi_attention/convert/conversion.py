"""Converts a pretrained decoder of transformers, or refuses before anything is changed."""

from __future__ import annotations

import gc
import warnings
from typing import Any

from transformers import PreTrainedModel

from pi_attention.convert.config import SETTINGS, PiConvertedConfig, need_layers, patterns_with, settings_of, windows_of
from pi_attention.convert.extension import check_extension
from pi_attention.convert.gates import GATE, takes_gate
from pi_attention.convert.interface import NAME, register_names
from pi_attention.convert.model import IN_USE, PiConvertedForCausalLM
from pi_attention.convert.undo import undone_on_failure
from pi_attention.describe import is_dense
from pi_attention.pattern import PiPattern, need_pattern

LOADER = "AutoModelForCausalLM.from_pretrained"


def convert(
    model: PreTrainedModel,
    pattern: PiPattern,
    *,
    gate: bool = False,
    layers: list[int] | None = None,
    extend_to: int | None = None,
) -> PiConvertedForCausalLM:
    """Give a pretrained causal language model π-Attention; its weights are shared, not copied.

    With the same weights the first forward is sparse softmax attention over the pattern: fusion="mass", where a learned
    gate starts at a = 0. Layers that have a sliding window of their own keep it. Model and config are changed in
    place, unless an error is raised: use what is returned.

    Args:
        model: a decoder of transformers that uses its attention interface (Llama, Qwen, Mistral, Gemma, gpt-oss …).
        pattern: causal; of the converted layers.
        gate: add a learned fusion gate to each converted layer, saved with the model. It costs time, and training it
            alone gained nothing that we could measure.
        layers: indices of the layers to convert; None converts all that attend to everything.
        extend_to: tokens, beyond the context of the pretraining. In layers that see so far, the rotary embedding turns
            slower, by the "NTK-aware" rule (YaRN, arXiv 2309.00071, section 3.1). Other layers stay as they are. Train
            the model on in texts of that length: pretrained weights know neither the angles nor the distances.

    Returns:
        A model for training, `generate`, `save_pretrained`; `AutoModelForCausalLM.from_pretrained` restores it once
        `pi_attention.convert` is imported.

    Raises:
        TypeError: the model is no model of transformers, or the pattern no pattern.
        ValueError: the model is no causal language model, or converted already; an earlier conversion with its
            configuration is in use, with another pattern or without this gate; the pattern is bidirectional; a layer
            does not exist or keeps a sliding window; a gate has no skips; or extend_to is not beyond the pretrained
            context, or no layer sees so far.
        NotImplementedError: the model does not use transformers' attention interface, or extend_to meets a rotary
            embedding that is scaled already, or of a kind for each layer.

    Example::

        model = convert(AutoModelForCausalLM.from_pretrained(name), PiPattern(512, 512, 16, sinks=4))
    """
    need_convertible(model, pattern, gate)
    config = model.config
    converted_layers = need_layers(layers, config)
    check_extension(extend_to, config, patterns_with(config, pattern, converted_layers))
    _warn_of_reach(model, pattern, extend_to)
    settings = settings_of(pattern, converted_layers)
    _refuse_in_use(model, settings, gate)
    register_names()
    with undone_on_failure(model):
        setattr(config, SETTINGS, settings)
        model.set_attn_implementation(NAME)
        converted = PiConvertedForCausalLM(PiConvertedConfig(config, gate=gate, extend_to=extend_to), model)
        converted.generation_config = model.generation_config
        return converted.train(model.training)


def _refuse_in_use(model: PreTrainedModel, settings: dict[str, Any], gate: bool) -> None:
    """Raise ValueError if an earlier conversion would get another pattern, or gates that it is saved without."""
    config = model.config
    differs = getattr(config, SETTINGS, None) != settings

    def in_use() -> bool:
        sharing = [made for made in IN_USE if made.config.text_config is config]
        return any(differs or (gate and made.model is model) for made in sharing)

    if not in_use():
        return
    gc.collect()
    if in_use():
        raise ValueError(
            "model shares its configuration with an earlier conversion that is in use, and would change what that one "
            "saves: delete the earlier one (del), or load the pretrained model again."
        )


def need_convertible(model: PreTrainedModel, pattern: PiPattern, gate: bool) -> None:
    """Refuse what `convert` cannot do to a model; nothing is changed.

    Raises:
        TypeError, ValueError, NotImplementedError: as `convert` does.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel, got {type(model).__name__}: load it by {LOADER}.")
    gated = any(hasattr(module, GATE) for module in model.modules())
    if isinstance(model, PiConvertedForCausalLM) or gated:
        raise ValueError("model is of an earlier conversion: load the pretrained model again, then convert.")
    if not model.can_generate():
        raise ValueError(f"model is a {type(model).__name__}, no causal language model: load it by {LOADER}.")
    need_pattern(pattern)
    if not pattern.causal:
        raise ValueError("pattern must be causal for a decoder: causal=True.")
    config = model.config
    if not isinstance(gate, bool):
        raise TypeError(f"gate must be True or False, got {gate!r}.")
    if not getattr(type(model), "_supports_attention_backend", False):
        raise NotImplementedError(f"{type(model).__name__} does not use transformers' attention interface.")
    pattern.check_heads(config.num_attention_heads)
    if gate and pattern.skips == 0:
        raise ValueError(f"gate=True weighs skips, and {pattern} has none: leave gate out.")
    if gate and not any(map(takes_gate, model.modules())):
        raise NotImplementedError(f"{type(model).__name__} has no attention with q_proj: convert with gate=False.")


def _warn_of_reach(model: PreTrainedModel, pattern: PiPattern, extend_to: int | None) -> None:
    """Warn of a pattern that no layer takes, and of skips beyond the context."""
    config = model.config
    windows = windows_of(config)
    if windows and None not in windows and not is_dense(pattern):
        warnings.warn(
            f"all layers keep their sliding window of {windows[0]}, so that no layer takes {pattern}: the model only "
            "gets the bounded cache.",
            stacklevel=3,
        )
    context = extend_to or getattr(config, "max_position_embeddings", None)
    if context is not None and pattern.skips != 0 and pattern.reach is not None and pattern.reach > context:
        warnings.warn(
            f"{pattern} reaches {pattern.reach} tokens back, further than the {context} tokens that the model was "
            f"{'extended' if extend_to else 'trained'} for: beyond them are lags that it does not know.",
            stacklevel=3,
        )
