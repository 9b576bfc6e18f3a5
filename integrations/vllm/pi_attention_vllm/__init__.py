"""Models of pi-attention in vLLM: a plugin that vLLM finds by its entry point."""

from __future__ import annotations

from typing import Any

from pi_attention_vllm.versions import is_known, need_known_version

MODELS = ("PiForCausalLM", "PiConvertedForCausalLM")
"""Architectures, as config.json names them."""


def register() -> None:
    """Let vLLM know the architectures, the configurations, and the cache; called in each of its processes."""
    from vllm import ModelRegistry

    import pi_attention.convert
    import pi_attention.models  # noqa: F401  both register their configurations, which vLLM reads

    for name in MODELS:
        ModelRegistry.register_model(name, "pi_attention_vllm:PiModelForVllm")
    if is_known():
        from pi_attention_vllm.blocks import register_blocks
        from pi_attention_vllm.served import register_check

        register_blocks()
        register_check(MODELS)


def __getattr__(name: str) -> Any:
    """`PiModelForVllm`, which needs interfaces that another version of vLLM may not have."""
    if name != "PiModelForVllm":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
    need_known_version()
    from pi_attention_vllm.model import PiModelForVllm

    return PiModelForVllm
