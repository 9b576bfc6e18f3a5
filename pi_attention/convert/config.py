"""What the layers of a decoder of transformers attend to, as its configuration says it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pi_attention.pattern import PiPattern
from pi_attention.stack import DENSE

SETTINGS = "pi_attention"
"""Attribute of a model's config: a dict of `PiPattern` fields, and "layers", the indices of the layers that get it."""


def settings_of(pattern: PiPattern, layers: list[int] | None = None) -> dict[str, Any]:
    """What `config.pi_attention` holds: JSON."""
    return pattern.to_dict() | {"layers": layers}


def layer_pattern(
    config: Any, layer: int, sliding_window: int | None = None, default: dict[str, Any] | None = None
) -> PiPattern:
    """What a layer of a model attends to: its own sliding window, the pattern of its config, or every earlier token.

    Args:
        config: of the model.
        layer: index of the layer.
        sliding_window: of the layer, if it has one of its own.
        default: the settings of a config without any.

    Raises:
        NotImplementedError: the layer is of another kind than full attention.
        ValueError: there are no settings.
    """
    if sliding_window is not None:
        return PiPattern(sliding_window, 1, 0)
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer] != "full_attention":
        raise NotImplementedError(f'attn_implementation="pi" cannot respect the layer type {kinds[layer]!r}.')
    settings = dict(getattr(config, SETTINGS, None) or default or {})
    if not settings:
        raise ValueError(
            'attn_implementation="pi" needs a pattern: register(PiPattern(...)), or set config.pi_attention to a dict '
            'such as {"window": 512, "period": 512, "skips": 16, "sinks": 4}.'
        )
    layers = settings.pop("layers", None)
    if layers is not None and layer not in layers:
        return DENSE
    return PiPattern.from_dict(settings)


class PiConvertedConfig(PretrainedConfig):
    """A decoder of transformers, and what its layers attend to.

    Args:
        text_config: of the decoder, with the pattern in its `pi_attention`.
        gate: learn a fusion gate in each converted layer.
        extend_to: tokens, beyond the pretrained context, for which the rotary embedding of layers that see so far turns
            slower; see `convert`. None leaves it.
    """

    model_type = "pi_converted"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    text_config: Any

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        gate: bool = True,
        extend_to: int | None = None,
        **kwargs: Any,
    ) -> None:
        if text_config is None:
            text_config = {"model_type": "llama", SETTINGS: settings_of(PiPattern(512, 512, 16))}
        if isinstance(text_config, dict):
            text_config = CONFIG_MAPPING[text_config["model_type"]](**text_config)
        self.text_config = text_config
        self.gate, self.extend_to = gate, extend_to
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            kwargs.setdefault(name, getattr(text_config, name, None))
        super().__init__(**kwargs)

    def patterns(self) -> list[PiPattern]:
        """The pattern of every layer."""
        config = self.text_config
        return [layer_pattern(config, layer, window) for layer, window in enumerate(windows_of(config))]


def windows_of(config: Any) -> list[int | None]:
    """The sliding window that each layer of a decoder has of its own; None where it attends to everything."""
    count = getattr(config, "num_hidden_layers", 0)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        kinds = ["sliding_attention"] * count  # as in Mistral
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def patterns_with(config: Any, pattern: PiPattern, layers: list[int] | None = None) -> list[PiPattern]:
    """What the layers of a decoder attend to once these take the pattern; None for all that attend to everything."""
    return [
        PiPattern(window, 1, 0) if window is not None else pattern if layers is None or layer in layers else DENSE
        for layer, window in enumerate(windows_of(config))
    ]


def free_layers(config: Any) -> list[int]:
    """The layers that attend to everything, and can take a pattern."""
    return [layer for layer, window in enumerate(windows_of(config)) if window is None]


def need_layers(layers: Any, config: Any) -> list[int] | None:
    """The layers of a model to convert, each once and in order; None for all that attend to everything, named or not.

    Raises:
        TypeError, ValueError: they are no list of whole numbers, none, not of the model, or keep a window of their own.
    """
    if layers is None:
        return None
    windows = windows_of(config)
    count = len(windows)
    entries = layers.tolist() if isinstance(layers, Tensor) else layers
    if not isinstance(entries, list | tuple | range | set) or not all(type(layer) is int for layer in entries):
        raise TypeError(f"layers={layers!r} must be a list of indices of layers, such as [0, 2], or None for all.")
    if not entries:
        raise ValueError(f"layers={layers!r} converts nothing: name the layers, or leave it out for all.")
    wrong = [layer for layer in entries if not 0 <= layer < count]
    if wrong:
        raise ValueError(f"layers={layers} holds {wrong[0]}, but the model has layers 0 to {count - 1}.")
    sliding = [layer for layer in entries if windows[layer] is not None]
    if sliding:
        raise ValueError(
            f"layers={layers} holds {sliding[0]}, which keeps a sliding window of {windows[sliding[0]]}: leave it out."
        )
    chosen = sorted(set(entries))
    return None if chosen == free_layers(config) else chosen
