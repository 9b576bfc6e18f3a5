"""Our caches in the places of transformers' caches: by class, by method, in other gradient modes, under PEFT."""

import copy

import pytest
import torch
from small_models import SIZES
from test_models import make, prompt
from test_static_cache import compile_on_the_cpu
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from pi_attention.models import PiCache, PiConfig, PiForCausalLM, PiStaticCache

SINKS = ["pi", "mixed"]


def filled(model, ids):
    return model(ids, use_cache=True).past_key_values


def test_each_is_what_transformers_asks_for():
    patterns = make().config.patterns()
    assert isinstance(PiCache(patterns), DynamicCache)
    assert isinstance(PiStaticCache(patterns, 20), StaticCache)
    for made, rest in ((PiCache, ()), (PiStaticCache, (20,))):
        for wrong in (make().config, patterns[0], [make().config]):
            with pytest.raises(TypeError, match=r"one PiPattern a layer, got .*: pass config\.patterns\(\)"):
                made(wrong, *rest)


def test_a_refused_crop_changes_no_layer():
    layers = {"num_hidden_layers": 2, "layer_patterns": ["dense", "local"]}
    model = PiForCausalLM(PiConfig(**SIZES | layers, window=4, skips=0))
    ids, cache = torch.randint(model.config.vocab_size, (1, 12)), model.new_cache()
    with torch.no_grad():
        for part in ids.split([10, 2], dim=1):
            model(part, past_key_values=cache)
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-3)
        assert [layer.get_seq_length() for layer in cache.layers] == [12, 12]
        after = torch.randint(model.config.vocab_size, (1, 3))
        found = model(after, past_key_values=cache).logits
        whole = model(torch.cat([ids, after], dim=1), use_cache=False).logits[:, -3:]
    assert torch.allclose(found, whole, atol=1e-5)


@pytest.mark.parametrize("name", SINKS)
@pytest.mark.parametrize("amount", [-3, -1, 0, -30, -60, 3, torch.tensor(-2), torch.tensor(2)], ids=repr)
def test_crop_accepts_and_refuses_what_the_library_s_does(amount, name):
    model, ids = make(name), prompt(1, 30)
    cache, theirs = model.new_cache(), DynamicCache()
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    theirs.update(torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8), 0)
    try:
        theirs.crop(amount)
    except ValueError:
        with pytest.raises(ValueError, match="negative"):
            cache.crop(amount)
        return
    cache.crop(amount)
    left = theirs.get_seq_length()
    assert cache.get_seq_length() == left
    rest = prompt(1, 5)
    want = model(torch.cat([ids[:, :left], rest], dim=1), use_cache=False).logits[:, left:]
    torch.testing.assert_close(model(rest, past_key_values=cache).logits, want)


def test_what_is_gone_cannot_be_taken_back():
    model = make()
    cache = filled(model, prompt(1, 30))
    model(prompt(1, 30), past_key_values=cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-40)


@pytest.mark.parametrize("indices", [torch.tensor([2, 0]), torch.tensor([True, False, True]), [1], [0, 0, 2]], ids=repr)
def test_rows_are_selected_as_the_library_s_are(indices):
    model, ids = make(), prompt(3, 20)
    cache, theirs = filled(model, ids), DynamicLayer()
    theirs.update(ids[:, None, :, None].float(), ids[:, None, :, None].float())
    theirs.batch_select_indices(indices)
    cache.batch_select_indices(indices)
    kept = theirs.keys[:, 0, :, 0].long()
    rest = prompt(len(kept), 4)
    want = model(torch.cat([kept, rest], dim=1), use_cache=False).logits[:, 20:]
    torch.testing.assert_close(model(rest, past_key_values=cache).logits, want)


@pytest.mark.parametrize("name", SINKS)
@pytest.mark.parametrize("length", [9, 30, 70])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_cache_of_inference_mode_goes_on_outside(static, length, name):
    model, ids = make(name), prompt(2, length + 12)
    cache = PiStaticCache(model.config.patterns(), 100) if static else model.new_cache()
    with torch.inference_mode():
        model(ids[:, :length], past_key_values=cache)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids[:, length:].split([1, 1, 7, 3], dim=1)]
    want = model(ids, use_cache=False).logits[:, length:]
    torch.testing.assert_close(torch.cat(parts, dim=1), want, rtol=1e-4, atol=1e-4)


def test_a_cache_of_inference_mode_goes_on_with_gradients():
    model, ids = make(), prompt(1, 40)
    with torch.inference_mode():
        cache = filled(model, ids[:, :30])
    model(ids[:, 30:], past_key_values=cache).logits.sum().backward()
    assert model.lm_head.weight.grad.isfinite().all()


def test_a_static_cache_of_inference_mode_is_reset_outside():
    model = make()
    cache = PiStaticCache(model.config.patterns(), 50)
    with torch.inference_mode():
        model(prompt(1, 9), past_key_values=cache)
    cache.reset()
    ids = prompt(1, 30)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("name", SINKS)
@torch.no_grad()
def test_a_copied_cache_serves_several_continuations(name):
    model, ids = make(name), prompt(1, 40)
    cache = filled(model, ids)
    for _ in range(2):
        rest = prompt(1, 6)
        got = model(rest, past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(got, model(torch.cat([ids, rest], 1), use_cache=False).logits[:, 40:])


def test_a_prefilled_cache_of_inference_mode_generates():
    model, ids = make().float(), prompt(1, 34)
    with torch.inference_mode():
        cache = filled(model, ids[:, :30])
    got = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, model.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_peft_s_virtual_tokens_generate(kind):
    peft = pytest.importorskip("peft")
    model = make().float()
    settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=6)
    tuned, ids = peft.get_peft_model(model, settings).eval(), prompt(2, 20)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    got = tuned.generate(input_ids=ids, max_new_tokens=4, **options)
    for step in range(4):  # greedy, one pass a token, without any cache
        seen = got[:, : 20 + step]
        logits = tuned(input_ids=seen, attention_mask=torch.ones_like(seen)).logits[:, -1]
        assert torch.equal(logits.argmax(-1), got[:, 20 + step])


def test_an_offloaded_cache_is_refused():
    with pytest.raises(NotImplementedError, match="keep it on the device"):
        make().generate(prompt(1, 9), cache_implementation="offloaded", max_new_tokens=3)


def test_a_smaller_second_length_compiles_nothing_again():
    model = make().float()
    options = {"cache_implementation": "static", "pad_token_id": 0, "compile_config": compile_on_the_cpu()}
    ids = prompt(1, 9)
    model.generate(ids, max_new_tokens=30, do_sample=False, **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = model.generate(ids, max_new_tokens=11, do_sample=False, **options)
    assert torch.equal(got, model.generate(ids, max_new_tokens=11, do_sample=False, pad_token_id=0))
