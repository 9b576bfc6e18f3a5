"""How tokens are batched into calls changes nothing: chunked, token by token, whole and speculative are one result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_convert import FAMILIES, SIZES
from test_models import make
from transformers import LlamaConfig, LlamaForCausalLM

from pi_attention import PiPattern, pi_attention
from pi_attention.cache.near import NearSinks, sinks_among
from pi_attention.convert import convert
from pi_attention.models import PiCache
from pi_attention.nn.rope import moved_rotary, rotary_frequencies

PATTERNS = st.builds(
    PiPattern,
    window=st.integers(1, 9),
    period=st.integers(1, 7),
    skips=st.sampled_from([0, 1, 3, None]),
    sinks=st.sampled_from([0, 1, 3, 6]),
)


def streaming(pattern, context, family="llama", **more):
    config, model, of_family = FAMILIES[family]
    torch.manual_seed(0)
    sizes = SIZES | of_family | {"max_position_embeddings": context, "num_hidden_layers": 2} | more
    if family == "gemma3":
        sizes["layer_types"] = ["full_attention", "sliding_attention"]
    converted = convert(model(config(**sizes)).double().eval(), pattern, gate=pattern.skips != 0)
    for name, parameter in converted.named_parameters():
        if "pi_gate" in name:
            torch.nn.init.normal_(parameter)
    return converted


def splits(length):
    """Sizes of chunks that add up to the length."""
    return st.lists(st.integers(1, 17), min_size=1, max_size=length).map(lambda sizes: cut(sizes, length))


def cut(sizes, length):
    taken, left = [], length
    while left:
        taken.append(min(sizes[len(taken) % len(sizes)], left))
        left -= taken[-1]
    return tuple(taken)


def logits_by(model, ids, split, mask=None, cache=None):
    found, past = [], 0
    for part in ids.split(split, dim=1):
        past += part.shape[1]
        seen = None if mask is None else mask[:, :past]
        out = model(part, attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


CASES = st.integers(1, 60).flatmap(lambda length: st.tuples(st.just(length), splits(length), splits(length)))


def check_a_batching(case, pattern, context, padding):
    length, one, other = case
    model = streaming(pattern, context)
    ids = torch.randint(3, 99, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1, : min(padding, length - 1)] = 0
    given_mask = mask if padding else None
    with torch.no_grad():
        results = [logits_by(model, ids, split, given_mask) for split in (one, other, 1)]
        results.append(model(ids, attention_mask=given_mask, use_cache=False).logits)
    for got in results[1:]:
        torch.testing.assert_close(got[mask > 0], results[0][mask > 0], rtol=1e-4, atol=1e-4)


ARGUMENTS = {
    "case": CASES,
    "pattern": PATTERNS,
    "context": st.sampled_from([8, 20, 40, 512]),
    "padding": st.sampled_from([0, 0, 3, 11]),
}


@settings(max_examples=25, deadline=None)
@given(**ARGUMENTS)
@pytest.mark.filterwarnings("ignore:.*reaches .* tokens back")
def test_chunks_steps_and_the_whole_agree(case, pattern, context, padding):
    check_a_batching(case, pattern, context, padding)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shard", range(4))
@settings(max_examples=300, deadline=None)
@given(**ARGUMENTS)
@pytest.mark.filterwarnings("ignore:.*reaches .* tokens back")
def test_chunks_steps_and_the_whole_agree_in_very_many_cases(shard, case, pattern, context, padding):
    check_a_batching(case, pattern, context, padding)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_chunks_and_steps_agree_in_other_families(family):
    model = streaming(PiPattern(4, 4, 2, sinks=3), 24, family)
    ids = torch.randint(3, 99, (2, 60))
    with torch.no_grad():
        want = logits_by(model, ids, 1)
        for split in (5, 13, 60):
            torch.testing.assert_close(logits_by(model, ids, split), want, rtol=1e-4, atol=1e-4)


def test_a_cache_that_the_user_made_moves_its_sinks_too():
    model = streaming(PiPattern(4, 4, 2, sinks=3), 24)
    ids = torch.randint(3, 99, (1, 50))
    with torch.no_grad():
        own = logits_by(model, ids, 7, cache=PiCache(model.config.patterns()))
        torch.testing.assert_close(own, logits_by(model, ids, 1), rtol=1e-4, atol=1e-4)


def test_values_and_gradients_are_those_of_sinks_moved_for_each_query():
    pattern, most, dim = PiPattern(3, 4, 2, sinks=2), 6, 8
    query, key, value = (torch.randn(1, 2, 14, dim, dtype=torch.float64, requires_grad=True) for _ in range(3))
    near = NearSinks(most, rotary_frequencies(dim - 2, 100.0))  # a partial rotary embedding
    position = torch.arange(14)[None]
    shift, is_sink = near.shift(position, 0), sinks_among(position, 0, pattern)

    def operator(query, key, value):
        return pi_attention(query, key, value, pattern, scale=dim**-0.5, impl="reference")

    def together(query, key, value):
        return near.attend(operator, query, key, value, shift, is_sink)

    def one_by_one(query, key, value):
        outs = []
        for i in range(14):
            moved = moved_rotary(key[:, :, : i + 1], shift[:, i : i + 1] * is_sink[:, : i + 1], near.frequencies)
            outs.append(operator(query[:, :, i : i + 1], moved, value[:, :, : i + 1]))
        return torch.cat(outs, dim=2)

    torch.testing.assert_close(together(query, key, value), one_by_one(query, key, value), rtol=1e-5, atol=1e-5)
    weights = torch.randn(1, 2, 14, dim, dtype=torch.float64)
    got, want = (
        torch.autograd.grad((way(query, key, value) * weights).sum(), (query, key, value))
        for way in (together, one_by_one)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "mode", [{"prompt_lookup_num_tokens": 5}, {"prefill_chunk_size": 7}, {"assistant": True}], ids=str
)
@pytest.mark.parametrize("sinks", [0, 3])
def test_speculation_is_greedy_beyond_the_context(sinks, mode):
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        max_position_embeddings=40,
        eos_token_id=None,
    )
    model = convert(LlamaForCausalLM(config), PiPattern(4, 4, 2, sinks=sinks), gate=True).eval()
    ids = torch.randint(2, 100, (1, 30), generator=torch.Generator().manual_seed(0))
    options = dict(mode)
    if options.pop("assistant", False):
        options["assistant_model"] = convert(
            LlamaForCausalLM(config), PiPattern(4, 4, 2, sinks=sinks), gate=True
        ).eval()
    greedy = model.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=0)
    assert torch.equal(greedy, model.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=0, **options))


@settings(max_examples=15, deadline=None)
@given(case=CASES)
def test_our_own_models_agree_in_any_split(case):
    length, one, other = case
    model, ids = make("mixed"), torch.randint(0, 64, (2, length))
    with torch.no_grad():
        torch.testing.assert_close(logits_by(model, ids, one), logits_by(model, ids, other))
        torch.testing.assert_close(logits_by(model, ids, one), model(ids, use_cache=False).logits)
