"""Decoding with tensors of fixed size: the same tokens as without a cache, compiled once."""

import pytest
import torch
from test_convert import converted, pretrained  # noqa: F401
from test_models import make, model, prompt  # noqa: F401
from transformers.generation.configuration_utils import CompileConfig

from pi_attention import PiPattern
from pi_attention.convert import convert
from pi_attention.models import PiStaticCache

MODES = [{"do_sample": False}, {"num_beams": 3}]


def compile_on_the_cpu():
    config = CompileConfig(mode="default", fullgraph=True)
    config._compile_all_devices = True
    return config


def both_ways(lm, ids, **options):
    options = {"max_new_tokens": 50, "pad_token_id": 0, "eos_token_id": None} | options
    static = lm.generate(ids, cache_implementation="static", disable_compile=True, **options)
    return static, lm.generate(ids, **options)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_static_generation_equals_bounded(model, mode):  # noqa: F811
    assert torch.equal(*both_ways(model, prompt(2, 9), **mode))
    assert torch.equal(*both_ways(model, prompt(2, 45), **mode))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_static_generation_of_converted_models(converted, mode):  # noqa: F811
    assert torch.equal(*both_ways(converted, prompt(2, 30) + 1, **mode))


@pytest.mark.parametrize("padding", [17, 28])
def test_left_padded_rows_equal_separate_ones(model, padding):  # noqa: F811
    ids, mask = prompt(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :padding] = 0
    together, _ = both_ways(model, ids, attention_mask=mask)
    _, alone = both_ways(model, ids[1:, padding:], attention_mask=mask[1:, padding:])  # or a token 0 were padding
    assert torch.equal(together[1, padding:], alone[0])


@pytest.mark.parametrize("split", [(60,), (13, 1, 1, 20, 5, 20), (1,) * 60], ids=["whole", "chunks", "tokens"])
def test_any_split_equals_the_whole(model, split):  # noqa: F811
    ids = prompt(2, 60)
    cache = PiStaticCache(model.config.patterns(), 60)
    logits = [model(part, past_key_values=cache).logits for part in ids.split(split, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_compiles_once_into_one_graph(batch):
    torch._dynamo.reset()
    small = make("mixed")
    options = {"cache_implementation": "static", "pad_token_id": 0, "compile_config": compile_on_the_cpu()}
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = small.generate(prompt(batch, 9), max_new_tokens=40, **options)
    assert torch.equal(compiled, small.generate(compiled[:, :9], max_new_tokens=40, pad_token_id=0))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("step", [True, False], ids=["step", "documents"])
def test_compiled_layers_share_the_starts_of_segments(layers, step):
    torch._dynamo.reset()
    small = make("pi", num_hidden_layers=layers)
    scans = []

    def count(graph, inputs):
        scans.append(sum(node.target in ("cummax", torch.cummax) for node in graph.graph.nodes))
        return graph

    options = {"segment_ids": (torch.arange(12)[None] > 5).int(), "use_cache": False}
    if step:
        cache = PiStaticCache(small.config.patterns(), 100)
        small(prompt(1, 12), past_key_values=cache)
        options = {"past_key_values": cache, "position_ids": torch.tensor([[12]])}
    ids = prompt(1, 1 if step else 12)
    with torch.no_grad():
        torch.compile(small, backend=count, fullgraph=True)(ids, **options)
    assert scans == [1]


def test_memory_is_bounded_and_addresses_stay():
    small = make("pi")
    cache = PiStaticCache(small.config.patterns(), 10_000)
    small(prompt(1, 9), past_key_values=cache)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    small(prompt(1, 1), past_key_values=cache)
    assert before == [layer.keys.data_ptr() for layer in cache.layers]
    assert all(layer.keys.shape[2] == 16 for layer in cache.layers)  # reach 15 and the token itself
    cache.reset()
    ids = prompt(1, 30)
    torch.testing.assert_close(small(ids, past_key_values=cache).logits, small(ids).logits)


def test_what_a_static_cache_cannot_do_is_refused():
    with pytest.raises(NotImplementedError, match="keep it on the device"):
        make("pi").generate(prompt(1, 9), cache_implementation="offloaded_static", max_new_tokens=3)
    converted_model = convert(pretrained(), PiPattern(4, 5, 3), gate=True)
    from transformers import StaticCache

    with pytest.raises(ValueError, match="StaticCache"):
        converted_model(prompt(1, 9), past_key_values=StaticCache(pretrained().config, max_cache_len=50))
    own = make("pi")
    with pytest.raises(ValueError, match="new keys at the end"):
        own(prompt(1, 9), past_key_values=StaticCache(own.config, max_cache_len=50))


def packed(split):
    positions = torch.cat([torch.arange(17), torch.arange(23)])[None]
    ids = prompt(1, 40)
    return ids, positions, list(zip(ids.split(split, dim=1), positions.split(split, dim=1), strict=True))


@pytest.mark.parametrize("split", [(40,), (7, 8, 25), (10, 30), (9, 2, 29), (1,) * 40], ids=str)
def test_padding_inside_a_row_ends_a_segment_in_any_split(split):
    small, ids, mask = make("mixed"), prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, 9:11] = mask[1, 20:23] = 0
    cache, logits, end = PiStaticCache(small.config.patterns(), 40), [], 0
    for part in ids.split(split, dim=1):
        end += part.shape[1]
        logits.append(small(part, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True).logits)
    want = small(ids, attention_mask=mask, use_cache=False).logits
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[seen], want[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", [(40,), (10, 30), (17, 23), (1,) * 40], ids=str)
@pytest.mark.parametrize("again", [False, True], ids=["fresh", "reset"])
def test_packed_documents_stay_apart_in_any_split(split, again):
    small = make("mixed")
    ids, positions, parts = packed(split)
    cache = PiStaticCache(small.config.patterns(), 40)
    if again:
        small(prompt(3, 12), past_key_values=cache)
        cache.reset()
    logits = [small(part, position_ids=at, past_key_values=cache).logits for part, at in parts]
    want = small(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), want, rtol=1e-4, atol=1e-4)


def test_given_segments_are_used_and_later_ones_refused():
    small = make("pi")
    ids, segments = prompt(1, 30), (torch.arange(30)[None] >= 11).int()
    cache = PiStaticCache(small.config.patterns(), 40)
    got = small(ids, segment_ids=segments, past_key_values=cache).logits
    torch.testing.assert_close(got, small(ids, segment_ids=segments, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="first tokens only"):
        small(ids[:, :1], segment_ids=segments, past_key_values=cache)


def test_a_converted_model_with_sinks_refuses_a_static_cache_beyond_its_context():
    dense = pretrained()
    dense.config.max_position_embeddings = 30
    streaming = convert(dense, PiPattern(4, 5, 3, sinks=2), gate=True)
    with pytest.raises(NotImplementedError, match="pretrained context of 30 tokens"):
        streaming.generate(prompt(1, 9) + 1, cache_implementation="static", max_new_tokens=50)
