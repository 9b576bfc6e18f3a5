"""What is computed in a wide type first: scores of half precision, and the angles of positions."""

import copy
import io

import pytest
import torch
from transformers import AutoModelForCausalLM

from pi_attention import PiPattern, pi_attention
from pi_attention.models import PiConfig, PiForCausalLM
from pi_attention.models.rotary import PiRotaryEmbedding

SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
]


def config_of(rope=None):
    sizes = {"vocab_size": 9, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 64}
    return PiConfig(**sizes, window=4, period=4, skips=2, rope_parameters=rope)


@pytest.mark.parametrize("skips", [0, 1, None])
@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_scores_that_overflow_before_they_are_scaled_are_exact(impl, skips):
    query, key = (torch.full((1, 1, 8, 128), value, dtype=torch.float16) for value in (30.0, 25.0))
    value = torch.randn(1, 1, 8, 128).half()
    pattern = PiPattern(4, 4, skips)
    out = pi_attention(query, key, value, pattern, impl=impl)  # scores of 96,000, scaled 8,485
    want = pi_attention(query.double(), key.double(), value.double(), pattern, impl="reference")
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)  # scores in fp32 round to 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_reference_rounds_once(dtype):
    query, key, value = (torch.randn(2, 2, 40, 64).to(dtype) for _ in range(3))
    gate, pattern = torch.randn(2, 2, 40), PiPattern(4, 4, 5)
    out = pi_attention(query, key, value, pattern, gate=gate, impl="reference")
    want = pi_attention(query.double(), key.double(), value.double(), pattern, gate=gate.double(), impl="reference")
    error = (out.double() - want).abs()
    assert out.dtype == dtype
    assert bool((error <= 0.502 * torch.finfo(dtype).eps * want.abs().clamp(min=2.0**-14) + 1e-6).all())


def test_eager_and_sdpa_agree_in_half_precision():
    torch.manual_seed(0)
    model = PiForCausalLM(config_of()).eval()
    for projection in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
        torch.nn.init.normal_(projection.weight, std=20.0)
    model.half()
    ids = torch.randint(9, (1, 12))
    logits = model(ids, use_cache=False).logits
    model.set_attn_implementation("eager")
    eager = model(ids, use_cache=False).logits
    assert eager.isfinite().all()
    torch.testing.assert_close(eager, logits, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rope", SCALINGS, ids=lambda rope: rope and rope["rope_type"])
@pytest.mark.parametrize("convert", ["to", "half", "bfloat16", "double", "load", "pickle", "meta"])
def test_frequencies_stay_in_fp32(convert, rope, tmp_path):
    model = PiForCausalLM(config_of(rope))
    position = torch.tensor([[8000, 60000]])
    want = model.model.rotary_emb(torch.zeros(1, 2, 64), position)
    if convert == "load":
        model.half().save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    elif convert == "pickle":
        file = io.BytesIO()
        torch.save(model.bfloat16(), file)
        model = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    elif convert == "meta":
        assert copy.deepcopy(model).to("meta").bfloat16().model.rotary_emb.inv_freq.dtype == torch.float32
    else:
        model = model.to(torch.bfloat16) if convert == "to" else getattr(model, convert)()
    rotary = model.model.rotary_emb
    assert {buffer.dtype for buffer in rotary.buffers()} == {torch.float32}
    for got, expected in zip(rotary(torch.zeros(1, 2, 64), position), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_only_the_type_of_the_frequencies_is_kept():
    rotary = PiRotaryEmbedding(config_of()).to("meta", torch.float16)
    assert rotary.inv_freq.is_meta
    assert rotary.to_empty(device="cpu").inv_freq.device.type == "cpu"
