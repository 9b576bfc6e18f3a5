"""What of vLLM and of a model is not served: refused by name, before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pi_attention.models.rotary import moving_rope_types


def need_served(vllm_config: Any) -> None:
    """Refuse settings of vLLM, and models, that were not tested.

    Raises:
        NotImplementedError: a setting or a part of the model is not served.
        ValueError: requests may outgrow the context that sinks need.
    """
    for setting, remedy in _settings(vllm_config):
        raise NotImplementedError(f"pi-attention-vllm does not serve {setting}: {remedy}.")
    config = vllm_config.model_config.hf_config
    for part in _parts(config):
        raise NotImplementedError(f"pi-attention-vllm does not serve a model with {part}: use generate.")
    _need_context(config, vllm_config.model_config.max_model_len)


def _settings(vllm_config: Any) -> Iterator[tuple[str, str]]:
    """Settings of vLLM that are not served, and what to do."""
    parallel = vllm_config.parallel_config
    for name in ("tensor", "pipeline", "data", "decode_context", "prefill_context"):
        size = getattr(parallel, f"{name}_parallel_size", 1)
        if size != 1:
            yield f"{name}_parallel_size={size}", "leave it at 1"
    if not vllm_config.model_config.enforce_eager:
        yield "CUDA graphs or torch.compile", "pass enforce_eager=True (--enforce-eager)"
    backend = vllm_config.attention_config.backend
    if backend is not None:
        yield f"the attention backend {backend.name}", "leave it out, for a pattern needs its own"
    if vllm_config.model_config.runner_type != "generate":
        yield f"runner={vllm_config.model_config.runner_type!r}", "generate with it"
    cache = vllm_config.cache_config
    if cache.cache_dtype != "auto":
        yield f"kv_cache_dtype={cache.cache_dtype!r}", "leave it at auto"
    if cache.kv_offloading_size is not None:
        yield "kv_offloading_size", "leave it out"
    if vllm_config.model_config.quantization is not None:
        yield f"quantization={vllm_config.model_config.quantization!r}", "load the weights as they are"
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield "disable_hybrid_kv_cache_manager", "leave it out, or layers that differ keep every token"
    for name in ("speculative_config", "lora_config", "kv_transfer_config"):
        if getattr(vllm_config, name) is not None:
            yield name, "leave it out"


def _parts(model_config: Any) -> Iterator[str]:
    """Parts of a model that are not served."""
    config = model_config.get_text_config()
    if getattr(model_config, "extend_to", None) is not None:
        yield f"layers whose rotary embedding turns slower (extend_to={model_config.extend_to})"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        yield f"soft-capped scores (attn_logit_softcapping={config.attn_logit_softcapping})"
    if getattr(config, "softcap", None) is not None:
        yield f"soft-capped scores (softcap={config.softcap})"
    if getattr(config, "sink_logit", False):
        yield "learned sink logits (sink_logit=True)"
    if config.model_type == "gpt_oss":
        yield "learned sink logits (gpt_oss)"
    if getattr(config, "num_kv_shared_layers", 0):
        yield f"layers that share keys (num_kv_shared_layers={config.num_kv_shared_layers})"
    for kind in moving_rope_types(config):
        yield f"rope_type={kind!r}, whose frequencies depend on the length"


def _need_context(config: Any, most: int) -> None:
    """Beyond the pretrained context the sinks of a converted model move along, which they do not here."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if config.model_type != "pi_converted" or context is None or not any(p.sinks for p in config.patterns()):
        return
    if most > context:
        raise ValueError(
            f"max_model_len={most} is more than the pretrained context of {context}, beyond which sinks move along, "
            "and not in vLLM: set a smaller max_model_len, or use generate or pi-attention serve."
        )


def register_check(models: Iterable[str]) -> None:
    """Let vLLM call `need_served` when it has put its configuration together, before it starts an engine."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class NeedServed(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            need_served(vllm_config)

    MODELS_CONFIG_MAP.update(dict.fromkeys(models, NeedServed))
