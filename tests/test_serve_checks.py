"""What `pi-attention serve` asks of a request, how it samples, what it holds: without the packages of the extra."""

import sys
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_attention.data.tokenizers import byte_tokenizer
from pi_attention.models import PiConfig, PiForCausalLM
from pi_attention.models.continuous import KNOWN
from pi_attention.serving.needs import need_server
from pi_attention.serving.requests import (
    CHAT,
    COMPLETION,
    Limits,
    RequestError,
    Settings,
    check_fields,
    check_messages,
    check_prompt,
    settings_of,
)
from pi_attention.serving.text import GrowingText, up_to_a_stop

known = pytest.mark.skipif(
    ".".join(transformers.__version__.split(".")[:2]) not in KNOWN, reason="continuous batching of another transformers"
)
LIMITS = Limits(prompt_tokens=100, new_tokens=50, context=100, open_requests=4)
TOKENIZER = byte_tokenizer()


@pytest.mark.parametrize(
    ("ends", "prompt", "asked", "tokens"),
    [
        *[(False, 80, 50, 50), (False, 80, None, 20), (False, 100, None, 50), (False, 30, None, 50)],
        *[(True, 80, 50, 20), (True, 80, None, 20), (True, 100, 5, 0), (True, 30, 40, 40), (True, 30, None, 50)],
    ],
)
def test_a_text_has_so_many_tokens_at_most(ends, prompt, asked, tokens):
    limits = replace(LIMITS, ends_at_context=ends)
    assert limits.of_text(prompt, asked) == tokens
    assert limits.request_tokens == (100 if ends else 150)


def settings_for(**body):
    return settings_of(body, LIMITS, Settings())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": 51}, "max_tokens must be a whole number from 1 to 50"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": "hot"}, "temperature must be a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": 1e-9}, r"at least 0\.001"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"stop": 3}, "stop must be a text"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"stop": [["a"]]}, "stop must be"),
        ({"stop": ["a"] * 5}, "at most 4 texts, got 5"),
        ({"stop": 0}, "stop must be a text"),
        ({"stop": False}, "stop must be a text"),
        ({"stop": {}}, "stop must be a text"),
        ({"stop": ""}, "none of them empty"),
        ({"stop": ["a", "b" * 1001]}, "at most 1,000 characters a text, got 1,001"),
        ({"stream": "yes"}, "stream must be true or false"),
        ({"stream": 0}, "stream must be true or false"),
    ],
)
def test_a_setting_that_cannot_be_is_named(body, words):
    with pytest.raises(RequestError, match=words) as refused:
        settings_for(**body)
    assert refused.value.status == 400 and refused.value.param in body


@known
def test_settings_are_the_requests_or_the_models():
    from pi_attention.models.sampling import RequestSampling

    defaults = Settings(max_new_tokens=7, temperature=0.5, top_k=20)
    assert settings_of({"stop": "x", "seed": 3}, LIMITS, defaults) == Settings(7, 0.5, 20, 1.0, 3, ["x"])
    asked = {"max_tokens": 9, "temperature": 0, "top_k": 0, "top_p": 0.5, "seed": 3, "stop": None}
    assert settings_of(asked, LIMITS, defaults) == Settings(9, 0.0, 0, 0.5, 3, [])
    whole = Settings(temperature=1, top_p=1, seed=3).sampling  # as a generation_config.json may hold them
    assert {name: type(value) for name, value in whole.items()} == RequestSampling.supported_kwargs
    assert settings_of({}, LIMITS, defaults).seed != settings_of({}, LIMITS, defaults).seed


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "other"}, 404, "'other' is not served here: use 'mine'"),
        ({"model": "../mine"}, 404, "not served"),
        ({"model": "mine@main"}, 404, "not served"),
        ({"model": ["mine"]}, 404, "no text"),
        ({"model": "\ud800"}, 404, "not served"),
        ({"generation_config": "{}"}, 400, "'generation_config' is no field"),
        ({"chat_template_kwargs": {}}, 400, "no field"),
        ({"\ud800" * 500: 1}, 400, "no field"),
        ({"n": 2}, 400, "n is not supported: leave it out, or give 1"),
        ({"n": True}, 400, "n is not supported: leave it out, or give 1"),
        ({"logprobs": 3}, 400, "logprobs is not supported"),
        ({"logprobs": 0}, 400, "logprobs is not supported"),  # the likelihoods of the answer alone
        ({"echo": 0}, 400, "echo is not supported"),
        ({"presence_penalty": False}, 400, "presence_penalty is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"suffix": "end"}, 400, "suffix is not supported"),
        ({"user": 3}, 400, "user must be a text"),
        ({"stream_options": "all"}, 400, "stream_options must be an object"),
    ],
)
def test_other_models_and_fields_without_effect_are_refused(body, status, words):
    for fields in (COMPLETION, CHAT):
        with pytest.raises(RequestError, match=words) as refused:
            check_fields(body, fields, "mine")
        assert refused.value.status == status
        assert len(str(refused.value.body()).encode()) < 400


def test_fields_that_ask_for_nothing_are_taken():
    neutral = {"n": 1, "echo": False, "logprobs": None, "tools": [], "frequency_penalty": 0.0, "user": "me"}
    for body in (neutral, {"model": "mine"}, {"model": None}, {"stream_options": {"include_usage": True}}):
        check_fields(body, COMPLETION, "mine")


@pytest.mark.parametrize("prompt", [None, 3, ["a"], [1, 2], {"a": 1}, "\ud800"])
def test_a_prompt_is_one_text(prompt):
    with pytest.raises(RequestError, match="prompt"):
        check_prompt({"prompt": prompt})


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hello",
        ["hello"],
        [{"content": "a"}],
        [{"role": 3, "content": "a"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ["a"]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": "a", "name": [1]}],
        [{"role": "user", "content": "a", "name": 0}],
        [{"role": "user", "content": "a", "name": "\ud800"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": []}],
    ],
)
def test_messages_are_a_conversation_of_texts(messages):
    with pytest.raises(RequestError, match="messages"):
        check_messages({"messages": messages})


def test_messages_of_texts_are_taken():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rules = {"role": "system", "content": "be kind", "name": None}
    check_messages({"messages": [rules, {"role": "user", "content": parts, "name": "Ann"}]})


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.one_of(st.lists(st.integers(0, 256), max_size=40), st.text(max_size=20).map(lambda t: list(t.encode()))),
    stops=st.lists(st.text(max_size=3, min_size=1), max_size=3),
)
def test_a_growing_text_is_the_decoded_text_up_to_a_stop(tokens, stops):
    """Any bytes, also those that are no text."""
    text = GrowingText(TOKENIZER, stops)
    parts = [text.step(None, token) for token in tokens]
    got = "".join(part for part in [*parts, text.rest()] if part)
    whole = TOKENIZER.decode(tokens, skip_special_tokens=True)
    found = [whole.find(stop) for stop in stops if stop in whole]
    if not found:
        assert got == whole and not text.stopped
    else:
        assert text.stopped and whole.startswith(got) and not any(stop in got for stop in stops)
        assert any(whole.startswith(stop, len(got)) for stop in stops)


def test_a_character_is_given_away_whole_and_a_stop_is_held_back():
    text = GrowingText(TOKENIZER, ["END"])
    given_away = [text.step(None, token) for token in "aπENXEND".encode()]
    assert given_away == ["a", None, "π", None, None, "ENX", None, None, None]
    assert text.stopped and text.rest() == "" and text.step(None, 65) is None


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 30)),
)
def test_where_a_text_stops_does_not_depend_on_its_tokens(text, stops, cuts):
    """It ends before the stop that is whole first, the longest one where several are."""
    pieces = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(ids))
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    tokens = [text[begin:end] for begin, end in pairwise(edges)]
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    end = min(ends, default=len(text))
    assert up_to_a_stop(pieces, tokens, stops) == text[: end - max(map(len, at_the_end(text[:end], stops)), default=0)]


def at_the_end(text, stops):
    return [stop for stop in stops if text.endswith(stop)]


def test_a_long_stop_costs_no_more_than_a_short_one():
    def spent(size):
        text = GrowingText(TOKENIZER, [letter * size for letter in "xyzw"])
        begun = time.perf_counter()
        for token in b"ax" * 50:
            text.step(None, token)
        return time.perf_counter() - begun

    assert min(spent(5_000) for _ in range(3)) < 20 * max(spent(2) for _ in range(3))


@known
def test_a_token_is_drawn_as_generate_draws_it_and_again_for_a_seed():
    from pi_attention.models.sampling import RequestSampling

    def drawn(rows, scores):
        states = [SimpleNamespace(logit_processor_kwargs=row, initial_tokens=[1], generated_tokens=[2]) for row in rows]
        sampling = RequestSampling()
        sampling.prepare_tensor_args([SimpleNamespace(state=state) for state in states])
        return sampling(scores.clone(), None).argmax(-1).tolist()

    scores = torch.randn(1, 30).expand(2000, 30)
    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    assert set(drawn([greedy] * 5, scores[:5])) == {scores[0].argmax().item()}
    seeds = [{"temperature": 0.7, "top_k": 5, "top_p": 1.0, "seed": seed} for seed in range(2000)]
    counts = torch.bincount(torch.tensor(drawn(seeds, scores)), minlength=30) / 2000
    best = scores[0].topk(5)
    want = torch.zeros(30).scatter(0, best.indices, (best.values / 0.7).softmax(-1))
    assert (counts - want).abs().max() < 0.05 and counts.count_nonzero() <= 5
    assert drawn([greedy, seeds[7]], scores[:2])[1] == drawn([seeds[7], seeds[8]], scores[:2])[0]
    nucleus = [{"temperature": 1.0, "top_k": 0, "top_p": 1e-6, "seed": seed} for seed in range(20)]
    assert set(drawn(nucleus, scores[:20])) == {scores[0].argmax().item()}


@known
@pytest.mark.parametrize("patterns", [["local", "local"], ["local", "dense"], ["dense", "dense"]])
@pytest.mark.parametrize("tokens", [1, 16, 100, 333])
def test_bytes_of_a_request_are_those_of_its_pages(patterns, tokens):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from pi_attention.serving.memory import PAGE, blocks, request_bytes

    model = PiForCausalLM(
        PiConfig(
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            window=8,
            period=5,
            skips=4,
            sinks=3,
            layer_patterns=patterns,
        )
    )
    number = blocks(model, tokens, requests=3)
    manager = model.init_continuous_batching(
        GenerationConfig(), ContinuousBatchingConfig(page_size=PAGE, num_blocks=number, max_batch_tokens=8)
    )
    cache = manager._create_batch_processor().cache
    for request in range(3):  # there is room for all
        state = SimpleNamespace(request_id=str(request), current_len=lambda: 0)
        assert cache.can_store_request_tokens(state, tokens)
    held = [len(a.block_table["0"]) * a.bytes_per_block for a in cache.cache_allocators.values()]
    assert request_bytes(model, tokens) == sum(held)


def test_what_the_server_needs_is_named(monkeypatch):
    monkeypatch.setattr("pi_attention.serving.needs.find_spec", lambda name: None if name == "uvicorn" else sys)
    with pytest.raises(ValueError, match=r"serve needs the package uvicorn: pip install 'pi-attention\[serve\]'"):
        need_server()
    monkeypatch.setattr("pi_attention.serving.needs.find_spec", lambda name: sys)
    monkeypatch.setattr("pi_attention.models.continuous.INSTALLED", "5.22.1")
    with pytest.raises(NotImplementedError, match=r"tested with transformers 5.23, and 5.22.1 is installed"):
        need_server()
