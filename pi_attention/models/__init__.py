"""Hugging Face models built from the layers of `pi_attention.nn`. Importing this registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from pi_attention.models.caching import PiCache
from pi_attention.models.configuration_pi import PiConfig
from pi_attention.models.modeling_pi import PiForCausalLM, PiModel, PiPreTrainedModel

AutoConfig.register("pi", PiConfig, exist_ok=True)
AutoModel.register(PiConfig, PiModel, exist_ok=True)
AutoModelForCausalLM.register(PiConfig, PiForCausalLM, exist_ok=True)

__all__ = ["PiCache", "PiConfig", "PiForCausalLM", "PiModel", "PiPreTrainedModel"]
