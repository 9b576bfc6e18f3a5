"""Small models with random weights, whose texts depend on what each layer sees."""

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pi_attention import PiPattern
from pi_attention.convert import convert
from pi_attention.models import PiConfig, PiForCausalLM

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 400,
    "pad_token_id": 0,
    "eos_token_id": None,
}
HYBRID = {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
PLAIN = {"window": 8, "period": 5, "skips": 4}
HEADS = {"window": 6, "period": [1, 5, 16, 7], "phase": [0, 2, 3, 1], "skips": 4}


def own(**settings):
    return lambda: PiForCausalLM(PiConfig(**SIZES | settings))


def converted(kind, config, pattern, gate=True, **more):
    return lambda: convert(kind(config(**SIZES | more)), PiPattern(**pattern), gate=gate)


MODELS = {
    "pi": own(**PLAIN),
    "pi: periods and phases of heads, sinks": own(**HEADS, sinks=3),
    "pi: sinks in more than one block": own(**PLAIN, sinks=20, fusion="mass", qk_norm=True),
    "pi: layers of many kinds, tied": own(
        **PLAIN, layer_patterns=["local", {"sinks": 3}, "dense"], tie_word_embeddings=True
    ),
    "pi: skips without end": own(window=4, period=8, skips=None, sinks=1),
    "llama: sinks": converted(LlamaForCausalLM, LlamaConfig, PLAIN | {"sinks": 3}),
    "llama: periods and phases of heads": converted(LlamaForCausalLM, LlamaConfig, HEADS),
    "qwen 3: no gate": converted(Qwen3ForCausalLM, Qwen3Config, PLAIN | {"sinks": 3}, gate=False, head_dim=16),
    "mistral: a window of its own": converted(
        MistralForCausalLM, MistralConfig, PLAIN | {"skips": 0}, gate=False, sliding_window=7
    ),
    "gemma 3: layers with windows of their own, capped logits": converted(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        PLAIN | {"sinks": 2},
        num_hidden_layers=4,
        final_logit_softcapping=3.0,
        **HYBRID,
    ),
}


def model_of(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if "gate" in part and "gate_proj" not in part:
                weight.normal_(std=0.5)
            elif weight.dim() == 2:
                weight.mul_(4.0)
    return model


def prompts_of(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 99, (length,), generator=generator).tolist() for length in lengths]
