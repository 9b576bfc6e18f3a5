"""Continuous batching of our models: transformers' manager, and a model and a configuration as it wants them."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from pi_attention.models.paged import SINKS, BatchingManager, install_allocator, paged_call
from pi_attention.models.ragged import Bounded
from pi_attention.models.rotary import moving_rope_types
from pi_attention.pattern import PiPattern

CACHED = "_cached_continuous_batching_manager"
UNTESTED = ("use_cuda_graph", "use_async_batching", "varlen_compile_config", "decode_compile_config")
"""Settings of transformers that were not tried with our models: refused where they are asked for, off otherwise."""
LEFT_OUT: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None,),
    "encoder_repetition_penalty": (None, 1.0),
    "guidance_scale": (None, 1.0),
    "max_time": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1.0),
    "stop_strings": (None,),
}
"""Settings of a text that transformers' continuous batching drops, or fails on, and the values that ask for nothing."""


def paged_config(model: Any) -> Any:
    """The configuration that the paged cache sees: which layers keep a ring and sinks, and how many tokens.

    A layer that sees every earlier token, dense or with skips=None, keeps all of them.
    """
    patterns = model.config.patterns()
    bounded = Bounded.among(patterns)
    config = deepcopy(model.config.get_text_config())
    config._attn_implementation = "pi"  # or the manager makes dense masks, which nobody reads
    config.layer_types = ["sliding_attention" if p in bounded.patterns else "full_attention" for p in patterns]
    config.sliding_window = None
    if bounded.patterns:
        config.sliding_window = bounded.sinks + bounded.reach + 1
        setattr(config, SINKS, bounded.sinks)
    return config


class ServedModel:
    """A model as transformers' manager calls it: one row with all requests, and a paged cache.

    Everything else is the model's own. So `generate` may run beside the manager.
    """

    _model: PreTrainedModel
    _patterns: list[PiPattern]

    def __init__(self, model: PreTrainedModel) -> None:
        config = paged_config(model)
        seen = SimpleNamespace(
            _attn_implementation="sdpa",  # of the names that the manager takes, the one that it leaves alone
            eos_token_id=model.config.eos_token_id,
            get_text_config=lambda: config,
        )
        vars(self).update(_model=model, _patterns=model.config.patterns(), config=seen, _supports_flash_attn=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def eval(self) -> ServedModel:
        """As of a module."""
        self._model.eval()
        return self

    def __call__(self, input_ids: Any, position_ids: Any, cache: Any, **arguments: Any) -> Any:
        keep = {name: arguments[name] for name in ("logits_to_keep",) if name in arguments}
        return self._model(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=paged_call(cache, arguments, self._patterns),
            use_cache=False,
            **keep,
        )


class PiBatchingManager(BatchingManager):
    """transformers' manager; a request that would end all others is refused before it is queued."""

    def add_request(self, input_ids: list[int], *args: Any, **kwargs: Any) -> str | None:
        """As of transformers.

        Raises:
            TypeError, ValueError: see `BoundedGeneration.check_request`.
        """
        most = kwargs.get("max_new_tokens", args[1] if len(args) > 1 else None)
        most = self.generation_config.max_new_tokens if most is None else most
        self.model.check_request(input_ids, most)
        return super().add_request(input_ids, *args, **kwargs)


def batching_manager(
    model: Any, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
) -> PiBatchingManager:
    """The manager of a model, or the one that an earlier call kept.

    Raises:
        NotImplementedError: the model or the settings need what was not tested.
    """
    from transformers import ContinuousBatchingConfig

    kept = getattr(model, CACHED, None)
    if isinstance(kept, PiBatchingManager):
        return kept
    settings = deepcopy(continuous_batching_config) or ContinuousBatchingConfig()
    _need_tested(model, settings)
    settings.use_cuda_graph = settings.use_async_batching = False
    generation_config = deepcopy(generation_config or model.generation_config)
    _need_served(generation_config)
    if generation_config.eos_token_id is None:  # as `generate` does
        generation_config.eos_token_id = model.generation_config.eos_token_id
    if generation_config.eos_token_id is None:
        generation_config.eos_token_id = -1  # the manager's word for none
    install_allocator()
    with torch.no_grad():
        return PiBatchingManager(
            model=ServedModel(model),
            generation_config=generation_config,
            continuous_batching_config=settings,
            workload_hints=workload_hints,
        )


def _need_served(generation_config: Any) -> None:
    asked = [name for name, plain in LEFT_OUT.items() if getattr(generation_config, name, None) not in plain]
    if asked:
        raise NotImplementedError(
            f"continuous batching of transformers leaves out {asked[0]}={getattr(generation_config, asked[0])!r} of "
            "the generation config: pass one without it, or use generate."
        )


def _need_tested(model: Any, settings: Any) -> None:
    asked = [name for name in UNTESTED if getattr(settings, name, None) not in (None, False, (False, False))]
    asked += ["cpu_offload_space"] if getattr(settings, "cpu_offload_space", 0) else []
    asked += ["default_compile_level"] if getattr(settings, "default_compile_level", 0) else []
    if asked:
        raise NotImplementedError(f"continuous batching of π-Attention runs without {asked[0]}: leave it out.")
    model.check_batching()
    if getattr(model, "_device_mesh", None) is not None:
        raise NotImplementedError("continuous batching of π-Attention runs on one device: load it without tp_plan.")
    for kind in moving_rope_types(model.config.get_text_config()):
        raise NotImplementedError(
            f"continuous batching cannot serve rope_type={kind!r}: its frequencies depend on the longest request "
            "of a batch. Use generate."
        )
