"""Settings of a model's configuration that could not work, or would do another thing than they say."""

from __future__ import annotations

import difflib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pi_attention.pattern import need_int

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
OPTIONAL_SIZES = ("intermediate_size", "num_key_value_heads", "head_dim", "loss_slice", "gate_features")
SWITCHES = ("gate", "qk_norm", "sink_logit", "tie_word_embeddings", "use_cache")
NOT_OURS = ("attention_bias", "attention_dropout", "hidden_act", "hidden_dropout", "mlp_bias", "sliding_window_pattern")
"""Settings of other models, which this one does not have."""


def check_settings(given: dict[str, Any]) -> None:
    """Raise TypeError or ValueError for a setting of `PiConfig` that is of another kind or out of range."""
    for name in SIZES:
        need_int(name, given[name], 1, "give a whole number")
    for name in OPTIONAL_SIZES:
        if given[name] is not None:
            need_int(name, given[name], 1, "give a whole number, or None for the default")
    for name in SWITCHES:
        if not isinstance(given[name], bool):
            raise TypeError(f"{name} must be True or False, got {given[name]!r}.")
    for name, least in (("rms_norm_eps", 0.0), ("initializer_range", 0.0)):
        _need_number(name, given[name], least)
    _check_layer_patterns(given["layer_patterns"], given["num_hidden_layers"])
    parameters = given["rope_parameters"]
    if given["rope_theta"] is not None:
        _need_number("rope_theta", given["rope_theta"], math.ulp(0.0))
    if parameters is None:
        return
    if not isinstance(parameters, dict):
        raise TypeError(f'rope_parameters must be a dict such as {{"rope_type": "default"}}, got {parameters!r}.')
    if parameters.get("rope_theta") is not None:
        _need_number("rope_theta", parameters["rope_theta"], math.ulp(0.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"rope_type={kind!r} is unknown: use one of {sorted({'default', *ROPE_INIT_FUNCTIONS})}.")


WORKED_OUT = {
    "pattern": "give window, period, skips and the others, such as by PiConfig(**pattern.to_dict())",
    "has_gates": "give gate",
}
"""What `PiConfig` has as properties, and how to set them."""


def _check_layer_patterns(kinds: Any, layers: int) -> None:
    if kinds is None:
        return
    if not isinstance(kinds, list | tuple):
        raise TypeError(f'layer_patterns must be a list such as ["local", "dense"], got {kinds!r}.')
    if len(kinds) > layers:
        warnings.warn(
            f"layer_patterns has {len(kinds)} entries, and num_hidden_layers={layers}: the last {len(kinds) - layers} "
            "are not used. Give as many layers, or a multiple.",
            stacklevel=4,
        )


def need_no_worked_out(names: Iterable[str]) -> None:
    """Raise TypeError for a name of `WORKED_OUT`."""
    for name in names:
        if name in WORKED_OUT:
            raise TypeError(f"PiConfig works {name!r} out from its settings: {WORKED_OUT[name]}.")


def warn_of_unknown(names: list[str], init: Callable[..., None]) -> None:
    """Warn of settings that are kept, as transformers keeps any, but do nothing: misspelt ones and other models'."""
    ours = [name for name in inspect.signature(init).parameters if name not in ("self", "kwargs")]
    usual = {*vars(PretrainedConfig()), *inspect.signature(PretrainedConfig.__init__).parameters}
    for name in names:
        near = difflib.get_close_matches(name, ours, n=1, cutoff=0.85)
        if name not in usual and (near or name in NOT_OURS):
            hint = f": did you mean {near[0]}?" if near and name not in NOT_OURS else ", leave it out."
            warnings.warn(f"PiConfig has no setting {name!r}, which does nothing{hint}", stacklevel=4)


def _need_number(name: str, value: Any, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise ValueError(f"{name} must be a finite number{' above' if least else ', at least'} 0, got {value!r}.")
