"""The argument by which transformers passes a cache: `past_key_values` before 5.24, `cache` from it on."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

from transformers import GenerationMixin

OURS = "past_key_values"
"""The argument of our models' forward, with every version."""
CACHE = "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else OURS
"""The library's name for it: of its models' argument, its outputs' field, and among the keywords of `generate`."""
OF_LAYER = "cache"
"""Our attention layers' argument, for the cache of one layer."""
STAYING = list(dict.fromkeys((OURS, CACHE, OF_LAYER)))
"""Arguments that stay where they are when a layer is on another device than its inputs, for accelerate."""


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a forward that has `past_key_values` take it under the library's name as well."""
    if CACHE == OURS:
        return forward

    @wraps(forward)
    def renaming(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.pop(CACHE, None)
        if cache is not None:
            if kwargs.get(OURS) is not None:
                raise TypeError(f"{CACHE} and {OURS} are one argument: leave one of them out.")
            kwargs[OURS] = cache
        return forward(self, *args, **kwargs)

    return renaming
