"""Models of every kind that continuous batching serves, and how the tests ask them for texts."""

import pytest
import torch
import transformers
from small_models import HEADS, HYBRID, PLAIN, converted, own, telling
from transformers import (
    ContinuousBatchingConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pi_attention.models.continuous import KNOWN

known = pytest.mark.skipif(
    ".".join(transformers.__version__.split(".")[:2]) not in KNOWN, reason="continuous batching of another transformers"
)
MODELS = {
    "pi": own(**PLAIN),
    "pi: sinks": own(**PLAIN, sinks=3),
    "pi: periods and phases of heads, sinks": own(**HEADS, sinks=2),
    "pi: layers of many kinds": own(**PLAIN, layer_patterns=["local", {"sinks": 3}, "dense"]),
    "pi: a window of one token": own(window=1, period=1, skips=0),
    "pi: skips without end": own(window=4, period=8, skips=None, sinks=1),
    "pi: no gate": own(**PLAIN, sinks=1, gate=False),
    "pi: mass, qk_norm": own(**PLAIN, sinks=1, fusion="mass", qk_norm=True),
    "pi: sink logit, soft caps": own(**HEADS, sink_logit=True, softcap=2.0),
    "llama": converted(LlamaForCausalLM, LlamaConfig, PLAIN),
    "llama: sinks": converted(LlamaForCausalLM, LlamaConfig, PLAIN | {"sinks": 3}),
    "llama: periods and phases of heads": converted(LlamaForCausalLM, LlamaConfig, HEADS | {"sinks": 3}),
    "llama: no gate": converted(LlamaForCausalLM, LlamaConfig, PLAIN | {"sinks": 4}, gate=False),
    "qwen 3": converted(Qwen3ForCausalLM, Qwen3Config, PLAIN | {"sinks": 3}, head_dim=8),
    "mistral: a window of its own": converted(
        MistralForCausalLM, MistralConfig, PLAIN | {"skips": 0}, gate=False, sliding_window=7
    ),
    "gemma 3: layers with windows of their own": converted(
        Gemma3ForCausalLM, Gemma3TextConfig, PLAIN | {"sinks": 2}, num_hidden_layers=4, **HYBRID
    ),
    "gemma 2: soft caps": converted(
        Gemma2ForCausalLM,
        Gemma2Config,
        PLAIN | {"sinks": 3},
        num_hidden_layers=4,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=2.0,
        **HYBRID,
    ),
    "gpt-oss: sink logit": converted(
        GptOssForCausalLM,
        GptOssConfig,
        HEADS | {"sinks": 2},
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        **HYBRID,
    ),
}


def model_of(name):
    torch.manual_seed(0)
    return telling(MODELS[name]())


def wanted(model, prompt, tokens):
    out = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def most_likely(model, prompt, text, within=1e-5):
    """Whether no other token is likelier than each of the text; of two alike, which one depends on the batches."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    return bool((logits.amax(-1) - logits[range(len(text)), text] < within).all())


def greedy(tokens, **more):
    return GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=-1, **more)


def small(**more):
    given = {"page_size": 4, "num_blocks": 150, "max_batch_tokens": 32, "max_memory_percent": 0.3}
    return ContinuousBatchingConfig(**given | more)


@pytest.fixture(autouse=True)
def one_thread():
    """Beside the manager's own thread, more of PyTorch's only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
