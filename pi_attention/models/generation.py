"""`generate` of transformers with caches of bounded memory."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from pi_attention.models.cache_argument import CACHE
from pi_attention.models.caching import PiCache, PiStaticCache
from pi_attention.models.continuous import need_known_version
from pi_attention.models.inputs import learned_positions
from pi_attention.ops.checks import check_layout


class BoundedGeneration:
    """Before GenerationMixin: `generate` makes our caches where transformers would make a dynamic or a static one."""

    config: Any
    generation_config: Any
    get_input_embeddings: Any

    def new_cache(self) -> PiCache:
        """An empty decoding cache of bounded memory for this model."""
        return PiCache(self.config.patterns())

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As of transformers, with a cache of bounded memory.

        Raises:
            TypeError: token ids or mask are a nested, sparse or quantised tensor.
        """
        named = {"inputs": inputs, **{name: kwargs.get(name) for name in ("input_ids", "attention_mask")}}
        for name, x in named.items():
            if isinstance(x, Tensor):
                check_layout(name, x, "[B, T]")
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As of transformers: the manager that serves requests as they come.

        Raises:
            NotImplementedError: with this version of transformers, or these settings, it was not tested.
        """
        need_known_version()
        from pi_attention.models.batching import batching_manager  # other versions have other names

        return batching_manager(self, *args, **kwargs)

    def generate_batch(
        self, inputs: list[list[int]], generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As of transformers: what each prompt is continued with, by request id.

        Raises:
            NotImplementedError: see `init_continuous_batching`.
            TypeError: `inputs` is no list.
            TypeError, ValueError: see `check_request`.
        """
        need_known_version()
        if not isinstance(inputs, list | tuple):
            raise TypeError(
                f"inputs must be a list of prompts, each a list of token ids, got {type(inputs).__name__}: of a tensor "
                "without padding pass tolist()."
            )
        most = kwargs.get("max_new_tokens")
        most = getattr(generation_config or self.generation_config, "max_new_tokens", None) if most is None else most
        for prompt in inputs:
            self.check_request(prompt, most)
        return super().generate_batch(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    @cached_property
    def _learned_positions(self) -> int | None:
        return learned_positions(self)

    def check_batching(self) -> None:
        """Raise NotImplementedError for a model whose layers could not keep requests apart."""

    def check_request(self, prompt: list[int], max_new_tokens: int | None) -> None:
        """Refuse a request that continuous batching would not serve exactly, or with which it would end all others.

        Raises:
            TypeError: the prompt is no list of token ids.
            ValueError: it is empty, holds what is no token of the model, or may outgrow the positions that it learned.
        """
        try:
            ids = torch.as_tensor(prompt)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"a prompt must be a list of token ids: {error}.") from error
        if not ids.numel():
            raise ValueError("a prompt is empty: give each request at least one token.")
        if ids.dim() != 1 or ids.dtype == torch.bool or ids.dtype.is_floating_point or ids.dtype.is_complex:
            raise TypeError(
                f"a prompt must be a list of token ids, got {ids.dtype} of shape {tuple(ids.shape)}: pass one list of "
                "ints for each request."
            )
        last = self.get_input_embeddings().num_embeddings - 1
        for token in (int(ids.min()), int(ids.max())):
            if not 0 <= token <= last:
                raise ValueError(f"a prompt holds the token {token}, and those of the model are 0 to {last:,}.")
        positions = self._learned_positions
        if positions is not None and (max_new_tokens is None or len(prompt) + max_new_tokens > positions):
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} may outgrow the {positions} "
                "positions that the model has learned: shorten the prompt or set a smaller max_new_tokens."
            )

    def _prepare_static_cache(
        self, cache_implementation: str, batch_size: int, max_cache_len: int, *args: Any, **kwargs: Any
    ) -> PiStaticCache:
        if "offloaded" in cache_implementation:
            raise NotImplementedError(
                f"cache_implementation={cache_implementation!r}: a cache is bounded, keep it on the device ('static')."
            )
        # as large as any before, because another size would compile again
        self._previous_max_cache_length = max(max_cache_len, getattr(self, "_previous_max_cache_length", -1))
        return PiStaticCache(self.config.patterns(), self._previous_max_cache_length)

    @staticmethod
    def create_masks_for_generate(
        inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor | None:
        """The padding mask of the new tokens [B, T]: a static cache knows that of the others."""
        if attention_mask is None:
            return None
        new = attention_mask[:, -inputs_embeds.shape[1] :]
        return new.clone(memory_format=torch.contiguous_format)  # the stride of a view would change, and recompile

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get(CACHE)
        if given is None and generation_config.cache_implementation == "offloaded":
            raise NotImplementedError(
                "cache_implementation='offloaded': a cache is bounded, keep it on the device (leave the option out)."
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if given is None and type(model_kwargs.get(CACHE)) is DynamicCache:
            model_kwargs[CACHE] = self.new_cache()
            if getattr(generation_config, "is_assistant", False):
                model_kwargs[CACHE].activate_past_recording()
