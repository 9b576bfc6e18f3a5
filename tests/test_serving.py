"""Continuous batching of transformers: token for token what `generate` gives, in bounded memory, or refused by name."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import need_triton
from served_models import MODELS, greedy, known, model_of, most_likely, one_thread, small, wanted  # noqa: F401
from small_models import HEADS, HYBRID, PLAIN, SIZES, converted, prompts_of, telling
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
)

from benchmarks.paged import served
from pi_attention import PiPattern
from pi_attention.convert import convert
from pi_attention.models import PiConfig, PiForCausalLM
from pi_attention.models.ragged import RaggedCall
from pi_attention.ops import paged
from pi_attention.ops.fused.attention import paged_decoding, why_not_triton


def texts(model, prompts, tokens, cb=None, **more):
    out = model.generate_batch(prompts, greedy(tokens, **more), continuous_batching_config=cb or small())
    assert not [result.error for result in out.values() if result.error]
    return [result.generated_tokens for result in out.values()]


@known
@pytest.mark.parametrize("name", MODELS)
def test_generate_batch_is_generate(name):
    model = model_of(name)
    prompts = prompts_of([5, 130, 40, 1, 17, 90])  # in chunks, packed, and beside requests that decode
    want = [wanted(model, prompt, 24) for prompt in prompts]
    assert len({tuple(text) for text in want}) == len(prompts)
    assert texts(model, prompts, 24) == want


@known
@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(
        ["pi: layers of many kinds", "pi: sink logit, soft caps", "llama: sinks", "gpt-oss: sink logit"]
    ),
    lengths=st.lists(st.integers(1, 60), min_size=2, max_size=6),
    tokens=st.lists(st.integers(2, 20), min_size=6, max_size=6),
    late=st.integers(0, 3),
    cancelled=st.booleans(),
    page=st.sampled_from([4, 16]),
    batch=st.sampled_from([8, 24, 200]),
    blocks=st.sampled_from([200, 700]),
)
def test_any_order_of_arrival_gives_the_same_texts(name, lengths, tokens, late, cancelled, page, batch, blocks):
    """Later requests come when an earlier one has finished; one may be cancelled; with few blocks, some are evicted."""
    model, prompts = model_of(name), prompts_of(lengths)
    manager_of = model.continuous_batching_context_manager
    given_settings = small(page_size=page, max_batch_tokens=batch, num_blocks=-(-blocks // page))
    got, late = {}, min(late, len(prompts) - 1)
    with manager_of(generation_config=greedy(20), continuous_batching_config=given_settings) as manager:
        first = len(prompts) - late
        for number in range(first):
            manager.add_request(prompts[number], request_id=str(number), max_new_tokens=tokens[number])
        if cancelled:
            manager.add_request(prompts[0], request_id="cancelled", max_new_tokens=100)
        for number in range(first, len(prompts) + 1):
            if number == first or number < len(prompts):
                result = manager.get_result(timeout=60)
                got[result.request_id] = result
            if number < len(prompts):
                manager.add_request(prompts[number], request_id=str(number), max_new_tokens=tokens[number])
        manager.cancel_request("cancelled")
        while len(got.keys() - {"cancelled"}) < len(prompts):
            result = manager.get_result(timeout=60)
            assert result is not None and manager.is_running()
            got[result.request_id] = result
    for number, prompt in enumerate(prompts):
        text = got[str(number)].generated_tokens
        assert len(text) == tokens[number]
        assert text == wanted(model, prompt, tokens[number]) or most_likely(model, prompt, text)


@known
@pytest.mark.parametrize("name", ["pi: sinks", "llama: periods and phases of heads", "pi: skips without end"])
def test_requests_that_lose_their_pages_begin_anew_and_give_the_same_texts(name):
    model, prompts = model_of(name), prompts_of([9, 4, 20, 7, 12, 5, 16, 8])
    watch, found = served(model, prompts, 40, pages=10)
    assert watch.evictions > 0
    assert watch.most <= watch.allocated
    assert [found[str(number)] for number in range(8)] == [wanted(model, prompt, 40) for prompt in prompts]


@known
def test_a_request_of_5000_tokens_holds_the_bytes_of_a_short_one():
    model = model_of("pi: sinks")
    watch, _ = served(model, prompts_of([4990]), 10, pages=12)
    held = {bytes_held for bytes_held, _ in watch.by_length.values()}
    slots = 3 + model.config.pattern.reach + 1
    assert held == {3 * -(-slots // 16) * 16 * 2 * 2 * 8 * 4}  # layers, pages of 16, keys and values, G, D, fp32
    assert max(watch.by_length) > 4990 and watch.most == max(held)


@known
@pytest.mark.parametrize("name", ["pi: periods and phases of heads, sinks", "llama: sinks", "pi: skips without end"])
def test_the_kernels_read_the_pages_where_they_lie(name, monkeypatch):
    """As on a GPU: a batch in which every request decodes is one launch a layer."""
    need_triton()
    model, prompts = model_of(name), prompts_of([5, 50, 17])
    want, launches = [wanted(model, prompt, 6) for prompt in prompts], []

    def counted(query, *arguments, **options):
        launches.append(len(query))
        return paged_decoding(query, *arguments, **options)

    monkeypatch.setattr(paged, "paged_decoding", counted)
    monkeypatch.setattr(paged, "why_not_auto", why_not_triton)
    given_settings = small(max_batch_tokens=100)
    manager = model.init_continuous_batching(generation_config=greedy(6), continuous_batching_config=given_settings)
    names, found = manager.add_requests(prompts), {}  # before the thread begins, so that all are there at once
    manager.start()
    while len(found) < len(names):
        result = manager.get_result(timeout=60)
        assert result is not None and not result.error
        found[result.request_id] = result.generated_tokens
    manager.stop()
    assert [found[name] for name in names] == want
    assert launches == [3] * (5 * model.config.get_text_config().num_hidden_layers)


@known
def test_generate_may_run_beside_the_manager_and_finds_the_model_as_it_was():
    model = model_of("gemma 3: layers with windows of their own")
    before, prompts = model.config.to_dict(), prompts_of([30, 9])
    want = [wanted(model, prompt, 40) for prompt in prompts]
    manager_of = model.continuous_batching_context_manager
    with manager_of(generation_config=greedy(40), continuous_batching_config=small()) as manager:
        manager.add_request(prompts[0], request_id="0")
        assert wanted(model, prompts[1], 40) == want[1]
        assert manager.get_result(timeout=60).generated_tokens == want[0]
    assert model.config.to_dict() == before
    assert wanted(model, prompts[0], 40) == want[0]


@known
def test_a_manager_may_be_kept_for_later_prompts():
    model = model_of("llama: sinks")
    prompts = prompts_of([21, 40])
    want = [wanted(model, prompt, 12) for prompt in prompts]
    for _ in range(2):
        out = model.generate_batch(prompts, greedy(12), continuous_batching_config=small(), persistent_manager=True)
        assert [result.generated_tokens for result in out.values()] == want
    model.destroy_cached_continuous_batching_manager()
    assert texts(model, prompts, 12) == want


@known
def test_a_model_of_transformers_keeps_its_own_allocator():
    from pi_attention.models.paged import install_allocator

    install_allocator()
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7)).eval()
    prompts = prompts_of([40, 3])
    assert texts(model, prompts, 12) == [wanted(model, prompt, 12) for prompt in prompts]


def ring(sinks, reach, page):
    """An allocator of one layer, and the pages that it took."""
    from pi_attention.models.paged import SINKS, RingAllocator

    config = SimpleNamespace(sliding_window=sinks + reach + 1, head_dim=8, hidden_size=32, num_attention_heads=4)
    setattr(config, SINKS, sinks)
    allocator = RingAllocator(
        index=0,
        config=config,
        num_key_value_heads=2,
        cache_dtype=torch.float32,
        page_size=page,
        layer_indices=[0],
        allow_block_sharing=False,
    )
    taken = iter(range(1000))
    allocator.pool = SimpleNamespace(get_free_blocks=lambda index, count: [next(taken) for _ in range(count)])
    allocator.sentinel_index, allocator.write_trash_index = -1, -2
    return allocator


@known
@settings(max_examples=60, deadline=None)
@given(
    sinks=st.integers(0, 5),
    reach=st.integers(0, 20),
    page=st.sampled_from([1, 4, 16]),
    chunks=st.lists(st.integers(1, 50), min_size=1, max_size=12),
)
def test_a_chunk_reads_the_sinks_and_the_tokens_in_reach_in_order(sinks, reach, page, chunks):
    allocator, rows, past = ring(sinks, reach, page), {}, 0
    for chunk in chunks:
        allocator.allocate_cache_to_request("a", past, chunk)
        read = [rows.get(row, "new") for row in allocator.get_read_indices("a", past, chunk)]
        seen = [p for p in range(past) if p < sinks or p >= past - reach]
        assert read == [*seen, *["new"] * chunk]
        assert allocator.get_seqlen_k(past, chunk) == len(read)
        written = allocator.get_write_indices("a", past, chunk)
        rows.update(zip(written, range(past, past + chunk), strict=True))
        past += chunk


@known
def test_a_request_of_any_length_keeps_the_same_pages():
    allocator, past = ring(4, 100, 16), 0
    for chunk in [250] * 400:
        allocator.allocate_cache_to_request("a", past, chunk)
        past += chunk
    assert past == 100_000
    assert len(allocator.block_table["a"]) == 7  # 105 slots in pages of 16
    assert max(allocator.get_write_indices("a", past, 250)) < 7 * allocator.block_physical_stride


def test_another_transformers_is_refused_by_its_version(monkeypatch):
    model = model_of("pi")
    for version in ("5.22.3", "5.24.0"):
        monkeypatch.setattr("pi_attention.models.continuous.INSTALLED", version)
        with pytest.raises(NotImplementedError, match=rf"tested with transformers 5.23, and {version}"):
            model.generate_batch([[3, 4]], max_new_tokens=2)
        with pytest.raises(NotImplementedError, match=version):
            model.init_continuous_batching()


@known
@pytest.mark.parametrize("setting", ["use_cuda_graph", "use_async_batching", "cpu_offload_space"])
def test_settings_that_were_not_tried_are_refused(setting):
    with pytest.raises(NotImplementedError, match=f"runs without {setting}"):
        model_of("pi").generate_batch([[3, 4]], greedy(2), continuous_batching_config=small(**{setting: True}))


@known
@pytest.mark.parametrize(
    "setting",
    [
        {"num_beams": 2},
        {"repetition_penalty": 1.1},
        {"min_new_tokens": 2},
        {"min_length": 9},
        {"no_repeat_ngram_size": 2},
        {"stop_strings": ["a"]},
        {"bad_words_ids": [[5]]},
        {"guidance_scale": 2.0},
        {"max_time": 1.0},
    ],
)
def test_settings_that_would_give_another_text_than_generates_are_refused(setting):
    (name,) = setting
    with pytest.raises(NotImplementedError, match=f"leaves out {name}="):
        model_of("pi").generate_batch([[3, 4]], greedy(2, **setting), continuous_batching_config=small())


@known
def test_a_text_ends_at_the_models_end_where_the_settings_name_none():
    model, prompt = model_of("pi"), prompts_of([9])[0]
    end = wanted(model, prompt, 12)[4]
    model.generation_config.eos_token_id = end
    want = wanted(model, prompt, 12)
    given = GenerationConfig(max_new_tokens=12, do_sample=False, num_beams=1, repetition_penalty=1.0)
    (result,) = model.generate_batch([prompt], given, continuous_batching_config=small()).values()
    assert result.generated_tokens == want and want[-1] == end and len(want) < 12


@known
def test_a_rotary_embedding_that_depends_on_the_batch_is_refused():
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = PiForCausalLM(PiConfig(**SIZES, **PLAIN, rope_parameters=scaled))
    with pytest.raises(NotImplementedError, match="rope_type='dynamic'"):
        model.generate_batch([[3, 4]], greedy(2), continuous_batching_config=small())


WINDOW = PiPattern(8, 1, 0, sinks=2)
BEYOND = {
    "llama: no sinks": converted(LlamaForCausalLM, LlamaConfig, PLAIN, max_position_embeddings=40),
    "llama: sinks": converted(LlamaForCausalLM, LlamaConfig, PLAIN | {"sinks": 3}, max_position_embeddings=40),
    "llama: heads that differ": converted(
        LlamaForCausalLM, LlamaConfig, HEADS | {"sinks": 2}, max_position_embeddings=70
    ),
    "gemma 3: two rotary embeddings": converted(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        PLAIN | {"sinks": 2},
        num_hidden_layers=4,
        max_position_embeddings=40,
        **HYBRID,
    ),
    "llama: all skips": converted(
        LlamaForCausalLM, LlamaConfig, PLAIN | {"skips": None, "sinks": 2}, max_position_embeddings=40
    ),
    "llama: a dense layer that turns slower": lambda: convert(
        LlamaForCausalLM(LlamaConfig(**SIZES | {"max_position_embeddings": 40})),
        WINDOW,
        layers=[0, 2],
        extend_to=200,
    ),
}
"""Models of a short context, whose sinks move along in the texts of the test below."""


@known
@pytest.mark.parametrize("batch", [16, 300])
@pytest.mark.parametrize("name", BEYOND)
def test_sinks_move_along_in_each_request_for_itself(name, batch):
    """In chunks, packed, whole, and where all requests decode; some texts outgrow the context, others do not."""
    torch.manual_seed(0)
    model = telling(BEYOND[name]())
    prompts = prompts_of([5, 130, 36, 1, 90])
    want = [wanted(model, prompt, 20) for prompt in prompts]
    assert len({tuple(text) for text in want}) == len(prompts)
    assert texts(model, prompts, 20, small(max_batch_tokens=batch, num_blocks=400)) == want


@known
def test_sinks_that_stayed_would_give_other_texts(monkeypatch):
    """So that the test above can fail."""
    torch.manual_seed(0)
    model, prompts = telling(BEYOND["llama: sinks"]()), prompts_of([130, 36])
    want = [wanted(model, prompt, 20) for prompt in prompts]
    monkeypatch.setattr(RaggedCall, "move_sinks", lambda *arguments: None)
    assert texts(model, prompts, 20, small(num_blocks=400)) != want


@known
@pytest.mark.parametrize("name", ["llama: sinks", "llama: all skips"])
def test_sinks_move_along_in_requests_that_begin_anew(name):
    torch.manual_seed(0)
    model, prompts = telling(BEYOND[name]()), prompts_of([9, 34, 20, 37, 12, 45, 16, 8])
    watch, found = served(model, prompts, 40, pages=10 if name == "llama: sinks" else 14)
    assert watch.evictions > 0
    assert [found[str(number)] for number in range(8)] == [wanted(model, prompt, 40) for prompt in prompts]


@known
def test_a_request_beyond_learned_positions_is_refused_and_ends_no_other():
    model = convert(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=40, vocab_size=99)), WINDOW)
    prompts = prompts_of([30, 36])
    with pytest.raises(ValueError, match="36 tokens and max_new_tokens=8 may outgrow the 40 positions"):
        texts(model, prompts, 8)
    manager_of = model.continuous_batching_context_manager
    with manager_of(generation_config=greedy(8), continuous_batching_config=small()) as manager:
        manager.add_request(prompts[0])
        with pytest.raises(ValueError, match="may outgrow the 40 positions"):
            manager.add_request(prompts[1])
        assert manager.get_result(timeout=60).generated_tokens == wanted(model, prompts[0], 8)


@known
def test_a_model_that_tells_its_attention_nothing_is_refused_at_the_start():
    model = convert(NemotronForCausalLM(NemotronConfig(**SIZES, head_dim=8)), WINDOW)
    with pytest.raises(NotImplementedError, match="NemotronForCausalLM hands its attention no further arguments"):
        texts(model, prompts_of([5]), 2)


@known
@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ([], ValueError, "a prompt is empty"),
        ([3, 99], ValueError, "holds the token 99, and those of the model are 0 to 98"),
        ([-1, 3], ValueError, "holds the token -1"),
        ([2**70], TypeError, "must be a list of token ids"),
        ([3.0], TypeError, "must be a list of token ids, got torch.float32"),
        ([True], TypeError, "got torch.bool"),
        ("to be", TypeError, "must be a list of token ids"),
        (["to be"], TypeError, "must be a list of token ids"),
        (None, TypeError, "must be a list of token ids"),
        (3, TypeError, r"of shape \(\): pass one list"),
        ([[3, 4]], TypeError, r"of shape \(1, 2\)"),
    ],
)
def test_a_prompt_that_would_end_the_others_is_refused(prompt, error, words):
    model = model_of("pi")
    with pytest.raises(error, match=words):
        model.generate_batch([[3], prompt], greedy(2), continuous_batching_config=small())
    manager_of = model.continuous_batching_context_manager
    with manager_of(generation_config=greedy(2), continuous_batching_config=small()) as manager:
        with pytest.raises(error, match=words):
            manager.add_request(prompt)
        manager.add_request([3, 4], request_id="other")
        assert manager.get_result(timeout=60).generated_tokens == wanted(model, [3, 4], 2)


@known
@pytest.mark.parametrize("inputs", [torch.tensor([[3, 4]]), "to be", None, ([3, 4] for _ in range(2))])
def test_prompts_are_a_list(inputs):
    with pytest.raises(TypeError, match="inputs must be a list of prompts"):
        model_of("pi").generate_batch(inputs, greedy(2), continuous_batching_config=small())


@known
def test_a_prompt_may_be_a_tensor_of_ids():
    model = model_of("pi")
    assert texts(model, [torch.tensor([3, 4])], 2) == texts(model, [[3, 4]], 2) == [wanted(model, [3, 4], 2)]
