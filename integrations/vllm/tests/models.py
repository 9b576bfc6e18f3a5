"""Small models with random weights, whose texts depend on what each layer sees."""

import torch
from small_models import HEADS, HYBRID, PLAIN, converted, own, telling
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
    return telling(MODELS[name]())
