"""Hugging Face models built from the layers of `pi_attention.nn`. Importing this registers the Auto classes."""

import transformers

from pi_attention.models.caching import PiCache, PiStaticCache
from pi_attention.models.configuration_pi import PiConfig
from pi_attention.models.modeling_pi import PiForCausalLM, PiModel, PiPreTrainedModel
from pi_attention.models.prompt_cache import PromptCache, load_prompt_cache, save_prompt_cache

transformers.AutoConfig.register("pi", PiConfig, exist_ok=True)
transformers.AutoModel.register(PiConfig, PiModel, exist_ok=True)  # before the heads, which build on it

from pi_attention.models.heads import (  # noqa: E402
    PiForMaskedLM,
    PiForQuestionAnswering,
    PiForSequenceClassification,
    PiForTokenClassification,
)

transformers.AutoModelForCausalLM.register(PiConfig, PiForCausalLM, exist_ok=True)
transformers.AutoModelForMaskedLM.register(PiConfig, PiForMaskedLM, exist_ok=True)
transformers.AutoModelForQuestionAnswering.register(PiConfig, PiForQuestionAnswering, exist_ok=True)
transformers.AutoModelForSequenceClassification.register(PiConfig, PiForSequenceClassification, exist_ok=True)
transformers.AutoModelForTokenClassification.register(PiConfig, PiForTokenClassification, exist_ok=True)

__all__ = [
    "PiCache",
    "PiConfig",
    "PiForCausalLM",
    "PiForMaskedLM",
    "PiForQuestionAnswering",
    "PiForSequenceClassification",
    "PiForTokenClassification",
    "PiModel",
    "PiPreTrainedModel",
    "PiStaticCache",
    "PromptCache",
    "load_prompt_cache",
    "save_prompt_cache",
]
