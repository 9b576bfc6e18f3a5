"""Give a pretrained Hugging Face decoder π-Attention: a pattern, a learned gate, a decoding cache of bounded memory.

Importing this registers the Auto classes of what `convert` returns.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from pi_attention.convert.choice import dense_gains, neediest
from pi_attention.convert.config import PiConvertedConfig
from pi_attention.convert.conversion import convert
from pi_attention.convert.interface import register
from pi_attention.convert.model import PiConvertedForCausalLM

AutoConfig.register("pi_converted", PiConvertedConfig, exist_ok=True)
AutoModelForCausalLM.register(PiConvertedConfig, PiConvertedForCausalLM, exist_ok=True)

__all__ = ["PiConvertedConfig", "PiConvertedForCausalLM", "convert", "dense_gains", "neediest", "register"]
