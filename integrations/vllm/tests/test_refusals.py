"""What is not served is refused by name, before an engine starts."""

import pytest
import torch
from conftest import SMALL
from small_models import PLAIN, SIZES
from transformers import Gemma2Config, LlamaConfig
from vllm.engine.arg_utils import EngineArgs

import pi_attention_vllm
from pi_attention.convert import PiConvertedConfig
from pi_attention.models import PiConfig, PiForCausalLM
from pi_attention_vllm import versions
from pi_attention_vllm.attention import PagedKeys, PagedLayer, Step

OWN = PiConfig(**SIZES, **PLAIN, sinks=2, architectures=["PiForCausalLM"])


def converted(kind=LlamaConfig, sinks=2, **more):
    text = kind(**SIZES | more, pi_attention={**PLAIN, "sinks": sinks, "layers": None})
    return PiConvertedConfig(text, architectures=["PiConvertedForCausalLM"])


def configured(folder, config, **settings):
    """vLLM's configuration for a model: what it puts together before it starts an engine."""
    config.save_pretrained(folder)
    return EngineArgs(model=str(folder), **SMALL | settings).create_engine_config()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2: leave it at 1"),
        ({"data_parallel_size": 2}, "data_parallel_size=2"),
        ({"enforce_eager": False}, "CUDA graphs or torch.compile: pass enforce_eager=True"),
        ({"attention_backend": "CPU_ATTN"}, "the attention backend CPU_ATTN"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8'"),
        ({"disable_hybrid_kv_cache_manager": True}, "disable_hybrid_kv_cache_manager"),
        ({"kv_offloading_size": 1.0}, "kv_offloading_size"),
        ({"runner": "pooling"}, "runner='pooling'"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_were_not_tried(settings, message, tmp_path):
    with pytest.raises(NotImplementedError, match=f"does not serve {message}"):
        configured(tmp_path, OWN, **settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PiConvertedConfig(converted().text_config, architectures=["PiConvertedForCausalLM"], extend_to=4096),
            r"layers whose rotary embedding turns slower \(extend_to=4096\)",
        ),
        (converted(Gemma2Config, head_dim=8, attn_logit_softcapping=50.0), r"soft-capped scores \(attn_logit_"),
        (PiConfig(**SIZES, **PLAIN, softcap=30.0, architectures=["PiForCausalLM"]), r"soft-capped scores \(softcap=30"),
        (PiConfig(**SIZES, **PLAIN, sink_logit=True, architectures=["PiForCausalLM"]), "learned sink logits"),
        (
            PiConfig(
                **SIZES,
                **PLAIN,
                rope_parameters={"rope_type": "dynamic", "factor": 2.0},
                architectures=["PiForCausalLM"],
            ),
            "rope_type='dynamic', whose frequencies depend on the length",
        ),
    ],
    ids=["soft caps", "soft caps of our own", "sink logits of our own", "rotary embedding that depends on the length"],
)
def test_parts_of_a_model_that_are_not_served(config, message, tmp_path):
    with pytest.raises(NotImplementedError, match=f"does not serve a model with {message}"):
        configured(tmp_path, config)


def test_a_context_in_which_sinks_would_move(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    with pytest.raises(ValueError, match="max_model_len=500 is more than the pretrained context of 400"):
        configured(tmp_path, converted(), max_model_len=500)
    for config in (converted(sinks=0), OWN):
        assert configured(tmp_path, config, max_model_len=500).model_config.max_model_len == 500


def test_another_vllm_is_refused_by_its_version(monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    with pytest.raises(NotImplementedError, match=r"tested with vLLM 0.32, and 0.33.0 is installed"):
        pi_attention_vllm.PiModelForVllm  # noqa: B018
    monkeypatch.setattr("vllm.__version__", "0.32.7")
    versions.need_known_version()


def test_a_checkpoint_of_another_model_is_refused():
    kind = pi_attention_vllm.PiModelForVllm
    model = kind.__new__(kind)
    vars(model).update(hf=PiForCausalLM(OWN), named_parameters=lambda: [])
    weights = dict(model.hf.state_dict())
    first = next(iter(weights))
    with pytest.raises(ValueError, match=r"holds lm_head.bias \(99,\), which in the model is not there"):
        model.load_weights({"lm_head.bias": weights["lm_head.weight"][:, 0]}.items())
    with pytest.raises(ValueError, match=rf"holds {first} \(1, 32\), which in the model is of shape \(99, 32\)"):
        model.load_weights({first: weights[first][:1]}.items())
    del weights[first]
    with pytest.raises(ValueError, match=f"lacks 1 tensors of the model, the first is {first}"):
        model.load_weights(weights.items())


def test_heads_that_differ_by_layer_are_refused():
    keys = PagedKeys("layers.0.attn", OWN.patterns()[0], {})
    keys.kv_cache = torch.zeros(3, 2, 4, 16)
    step = Step([0], [2], torch.tensor([[1]], dtype=torch.int32), torch.tensor([4, 5]))
    layer, new = PagedLayer(keys, step, 2), torch.ones(1, 2, 2, 8)
    assert [x.shape for x in layer.extend(new, new)[:2]] == [(1, 2, 2, 8)] * 2
    with pytest.raises(NotImplementedError, match="heads that differ by layer"):
        layer.extend(new[..., :4], new[..., :4])
