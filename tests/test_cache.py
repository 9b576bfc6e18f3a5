import itertools
from copy import deepcopy

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_attention import PiPattern, pi_attention
from pi_attention.cache import LayerCache, StaticLayerCache
from pi_attention.cache.fixed import FollowingLayerCache
from pi_attention.cache.starts import Once
from pi_attention.segments import segment_starts

PATTERNS = [
    PiPattern(4, 5, 3),
    PiPattern(4, 5, 3, sinks=2),
    PiPattern(6, (3, 11), 2, sinks=3),
    PiPattern(1, 1, 0),
    PiPattern(3, 4, None, sinks=1),
    PiPattern(5, 4, 3, sinks=1, phase=(3, 2)),
]


def tokens(length, batch=2, heads=2, dim=4):
    return [torch.randn(batch, heads, length, dim, dtype=torch.float64) for _ in range(3)]


def cached(pattern, query, key, value, chunks, segment_ids=None, cache=None):
    """Outputs of a sequence that is fed in chunks."""
    cache = cache or LayerCache(pattern)
    outs, first = [], cache.length
    for chunk in chunks:
        end = first + chunk
        ids = None if segment_ids is None else segment_ids[:, :end]
        kept_key, kept_value, ids = cache.extend(key[:, :, first:end], value[:, :, first:end], ids)
        outs.append(pi_attention(query[:, :, first:end], kept_key, kept_value, pattern, segment_ids=ids))
        first = end
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize("pattern", [PiPattern(2, 2, 1, sinks=2), PiPattern(1, 1, 0, sinks=2)], ids=str)
def test_caches_that_go_on_from_one_prompt_leave_it_as_it_was(pattern):
    prompt, ids = LayerCache(pattern), torch.zeros(1, 13, dtype=torch.int32)
    prompt.extend(*tokens(12, batch=1)[:2])
    what = prompt.held()
    states = what.states.clone()
    ids[:, 12:] = 1
    for ids_of_all in (ids, None):  # another document, whose sinks take the place of the first's; or the same
        cache = LayerCache(pattern)
        cache.hold(what)
        cache.extend(*tokens(1, batch=1)[:2], ids_of_all)
        assert torch.equal(what.states, states)


@pytest.mark.parametrize("pattern", [PiPattern(2, 2, 1), PiPattern(2, 2, 1, sinks=2)], ids=str)
@pytest.mark.parametrize("cache", [LayerCache, lambda pattern: StaticLayerCache(pattern, 20)], ids=["grows", "static"])
def test_segment_ids_come_to_the_device_of_the_keys(cache, pattern):
    made = cache(pattern)
    key = torch.empty(1, 1, 5, 4, device="meta")  # as on the second GPU of a model that is spread over two
    for length in (5, 10):
        _, _, ids = made.extend(key, key, torch.zeros(1, length, dtype=torch.int32))
        assert ids.device == key.device


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@settings(max_examples=15, deadline=None)
@given(chunks=st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_any_chunking_equals_the_whole_far_past_the_reach(pattern, chunks):
    chunks = [*chunks, *[1] * 150, 40, *[1] * 3]
    query, key, value = tokens(sum(chunks))
    whole = pi_attention(query, key, value, pattern, impl="reference")
    torch.testing.assert_close(cached(pattern, query, key, value, chunks), whole)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@settings(max_examples=15, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 30), min_size=2, max_size=12), pads=st.tuples(st.integers(0, 40), st.integers(0, 9))
)
def test_left_padding_and_documents_equal_the_whole(pattern, chunks, pads):
    chunks = [*chunks, *[1] * 60]
    length = sum(chunks)
    ids = torch.zeros(2, length, dtype=torch.int32)
    for row, pad in enumerate(pads):
        ids[row, length // 2 :] = 1  # a second document
        ids[row, : min(pad, length - 1)] = -1
    query, key, value = tokens(length)
    whole = pi_attention(query, key, value, pattern, segment_ids=ids, impl="reference")
    torch.testing.assert_close(cached(pattern, query, key, value, chunks, ids), whole)


def storages(pattern, length):
    return LayerCache(pattern), StaticLayerCache(pattern, length)


STORAGES = {"growing": LayerCache, "static": lambda pattern: StaticLayerCache(pattern, 200)}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@settings(max_examples=20, deadline=None)
@given(
    before=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    behind=st.lists(st.integers(1, 10), min_size=1, max_size=5),
    pads=st.tuples(st.integers(0, 40), st.integers(0, 9), st.integers(0, 3)),
    documents=st.booleans(),
    kinds=st.tuples(st.sampled_from(list(STORAGES)), st.sampled_from(list(STORAGES))),
)
def test_what_is_held_goes_on_in_another_cache(pattern, before, behind, pads, documents, kinds):
    """Padding on the left, a document that ends anywhere, and padding on the right of the first tokens."""
    first, length = sum(before), sum(before) + sum(behind)
    ids = torch.zeros(2, length, dtype=torch.int32)
    if documents:
        ids[0, length // 2 :] = 1
        ids[1, first - min(pads[2], first - 1) : first] = -1
        ids[1, first:] = 2
    for row, pad in enumerate(pads[:2]):
        ids[row, : min(pad, first - 1)] = -1
    query, key, value = tokens(length)
    whole = pi_attention(query, key, value, pattern, segment_ids=ids, impl="reference")
    one, other = (STORAGES[kind](pattern) for kind in kinds)
    starts, done, outs = segment_starts(ids), 0, []
    for chunk in [*before, *behind]:
        if done == first:
            held = one.held()
            assert held.length == first and held.states.shape[3] <= pattern.sinks + max(1, pattern.reach or first)
            other.hold(held)
        end = done + chunk
        new = [x[:, :, done:end] for x in (key, value)]
        keys, values, seen = (one if done < first else other).extend(*new, starts[:, done:end])
        outs.append(pi_attention(query[:, :, done:end], keys, values, pattern, segment_ids=seen))
        done = end
    torch.testing.assert_close(torch.cat(outs, dim=2), whole)


def test_nothing_is_held_by_an_empty_cache_and_a_short_one_takes_none():
    pattern = PATTERNS[1]
    for storage in (LayerCache(pattern), StaticLayerCache(pattern, 9)):
        with pytest.raises(ValueError, match="cache is empty"):
            storage.held()
        storage.extend(*tokens(8)[:2])
        with pytest.raises(ValueError, match="max_length=8 leaves no room beside the 8 tokens"):
            StaticLayerCache(pattern, 8).hold(storage.held())
    storage.extend(*tokens(2)[:2])
    with pytest.raises(ValueError, match="seen 10 tokens, more than its max_length=9"):
        storage.held()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@settings(max_examples=6, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 25), min_size=2, max_size=5),
    documents=st.lists(st.integers(0, 60), max_size=4),
    alone=st.booleans(),
)
def test_both_storages_keep_one_contract(pattern, chunks, documents, alone):
    """Segment ids of all tokens, whose numbers may come again, or the starts of the new ones alone."""
    chunks = [*chunks, *[1] * 8, 5]
    length = sum(chunks)
    parity = sum((torch.arange(length) >= start).int() for start in documents) if documents else torch.zeros(length)
    ids = torch.stack([parity % 2, torch.where(torch.arange(length) < 5, -1, 0)]).int()
    query, key, value = tokens(length)
    whole = pi_attention(query, key, value, pattern, segment_ids=ids, impl="reference")
    starts = segment_starts(ids)
    for cache in storages(pattern, length):
        outs, first = [], 0
        for end in torch.tensor(chunks).cumsum(0).tolist():
            new = slice(first, end)
            given_ids = starts[:, new] if alone else ids[:, :end]
            *seen, of_keys = cache.extend(key[:, :, new], value[:, :, new], given_ids)
            outs.append(pi_attention(query[:, :, new], *seen, pattern, segment_ids=of_keys))
            first = end
        torch.testing.assert_close(torch.cat(outs, dim=2), whole)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_tokens_without_ids_go_on_with_the_last_segment(pattern):
    ids = torch.tensor([[0] * 20 + [1] * 30, [-1] * 20 + [0] * 30], dtype=torch.int32)
    query, key, value = tokens(50)
    whole = pi_attention(query, key, value, pattern, segment_ids=ids, impl="reference")
    for cache in storages(pattern, 50):
        cache.extend(key[:, :, :30], value[:, :, :30], ids[:, :30])
        for t in range(30, 50):
            *seen, of_keys = cache.extend(key[:, :, t : t + 1], value[:, :, t : t + 1])
            out = pi_attention(query[:, :, t : t + 1], *seen, pattern, segment_ids=of_keys)
            torch.testing.assert_close(out, whole[:, :, t : t + 1])


def test_segment_ids_of_another_length_are_refused():
    cache, new = LayerCache(PiPattern(4, 5, 3)), torch.randn(1, 2, 4, 8)
    cache.update(new, new)
    with pytest.raises(ValueError, match="must have 8 columns"):
        cache.extend(new, new, torch.zeros(1, 7, dtype=torch.int32))


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.reach is not None], ids=str)
def test_memory_is_bounded_whatever_the_length(pattern):
    cache = LayerCache(pattern)
    bound = (pattern.sinks + pattern.reach + 2) * 5 // 4 + 64 + 1
    for step in range(2000):
        cache.update(*(torch.randn(1, 1, 1, 4) for _ in range(2)))
        assert cache.nbytes <= 2 * bound * 4 * 4, step
        assert cache.keys.shape[2] <= pattern.reach + (65 if pattern.sinks else 1)  # sinks move once in 64 steps
    assert cache.length == 2000


def test_memory_of_a_long_prompt_is_released():
    cache = LayerCache(PiPattern(4, 5, 3))
    cache.update(torch.randn(1, 1, 5000, 4), torch.randn(1, 1, 5000, 4))
    cache.update(torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4))
    assert cache.nbytes < 2 * 200 * 4 * 4


def test_a_prompt_is_not_copied_until_more_tokens_come():
    key, value = (torch.randn(1, 2, 5000, 4) for _ in range(2))
    cache = LayerCache(PiPattern(4, 5, 3, sinks=2))
    seen = cache.update(key, value)
    assert seen[0] is key and seen[1] is value and cache.keys is key
    assert cache.nbytes == key.nbytes + value.nbytes
    cache.crop(10)
    assert torch.equal(cache.keys, key[:, :, :4990]) and cache.length == 4990


def test_a_prompt_that_lies_in_a_larger_projection_does_not_hold_it():
    both = torch.randn(1, 5000, 3, 2, 4)  # query, key and value of one product
    key, value = both[:, :, 1].transpose(1, 2), both[:, :, 2].transpose(1, 2)
    cache = LayerCache(PiPattern(4, 5, 3))
    seen, _ = cache.update(key, value)
    assert seen is key
    assert cache.nbytes == key.nbytes + value.nbytes


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_recorded_prompt_keeps_what_may_be_taken_back(pattern, packed):
    query, key, value = tokens(60)
    ids = segment_starts((torch.arange(60) >= 20).int().repeat(2, 1)) if packed else None
    whole = pi_attention(query, key, value, pattern, segment_ids=ids, impl="reference")
    cache = LayerCache(pattern)
    cached(pattern, query, key, value, [40], ids, cache)
    cache.record()
    cached(pattern, query, key, value, [5], ids, cache)
    cache.crop(25)
    out = cached(pattern, query, key, value, [1, 7, 32], ids, cache)
    torch.testing.assert_close(out, whole[:, :, 20:])


def test_layers_share_the_starts_of_a_prompt_s_documents():
    starts = segment_starts(torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.int32))
    once = Once()
    layers = [LayerCache(PiPattern(4, 5, 3, sinks=2), once) for _ in range(2)]
    for tokens in (5, 1):
        first, second = (
            layer.extend(torch.randn(1, 1, tokens, 4), torch.randn(1, 1, tokens, 4), starts)[2] for layer in layers
        )
        assert first is second and segment_starts(first) is first  # which nobody scans
        starts = None


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_layers_of_one_pattern_share_where_segments_start(pattern):
    """Whatever happens to their caches between calls; and the outputs are those of a cache of its own."""
    batch = tokens(70)
    ids = torch.zeros(2, 70, dtype=torch.int32)
    ids[0, 33:], ids[1, :9] = 1, -1
    batch.append(segment_starts(ids))
    once = Once()
    shared, alone = [LayerCache(pattern, once) for _ in range(3)], LayerCache(pattern)

    def outputs(cache, first, end, new):
        part = [x[:, :, first:end].clone() for x in batch[:3]]
        *seen, of_keys = cache.extend(*part[1:], new)
        return pi_attention(part[0], *seen, pattern, segment_ids=of_keys)

    for first, end in itertools.pairwise([0, 30, 31, 40, 41, 42, 60, 61, 70]):
        new = None if first == 40 else batch[3][:, first:end].clone()  # None: the last segments go on
        want = outputs(alone, first, end, new)
        assert all(torch.equal(outputs(cache, first, end, new), want) for cache in shared)
        if first == 41:  # a token is taken back and comes again
            for cache in (alone, *shared):
                cache.crop(1)
                outputs(cache, first, end, new)
        if first == 42:  # rows change places
            order = torch.tensor([1, 0])
            for cache in (alone, *shared):
                cache.reorder(order)
            batch = [x[order] for x in batch]
        assert first == 0 or shared[0]._starts is shared[1]._starts is shared[2]._starts is not None


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_recorded_tokens_can_be_taken_back(pattern):
    query, key, value = tokens(120)
    whole = pi_attention(query, key, value, pattern, impl="reference")
    cache = LayerCache(pattern)
    cache.record()
    first = 0
    while first < 110:  # guess 7, keep 4
        guess = [x[:, :, first : first + 7].clone() for x in (key, value)]
        for x in guess:
            x[:, :, 4:] = 99.0
        seen = cache.update(*guess)
        out = pi_attention(query[:, :, first : first + 7], *seen, pattern)
        torch.testing.assert_close(out[:, :, :4], whole[:, :, first : first + 4])
        cache.crop(3)
        first += 4
    # several updates, then one crop
    cache.update(key[:, :, first : first + 1], value[:, :, first : first + 1])
    seen = cache.update(key[:, :, first + 1 : first + 3], value[:, :, first + 1 : first + 3])
    torch.testing.assert_close(
        pi_attention(query[:, :, first + 1 : first + 3], *seen, pattern), whole[:, :, first + 1 : first + 3]
    )
    cache.crop(3)
    seen = cache.update(key[:, :, first : first + 3], value[:, :, first : first + 3])
    torch.testing.assert_close(
        pi_attention(query[:, :, first : first + 3], *seen, pattern), whole[:, :, first : first + 3]
    )


def test_starts_that_the_caller_writes_to_later_are_not_those_of_the_cache():
    query, key, value = tokens(21, batch=1)
    pattern, ids = PiPattern(4, 5, 3, sinks=2), (torch.arange(21) >= 12).int()[None]
    starts, cache = segment_starts(ids[:, :20]), LayerCache(pattern)
    cache.extend(key[:, :, :20].clone(), value[:, :, :20].clone(), starts)
    starts.zero_()  # the buffer's next batch
    *seen, of_keys = cache.extend(key[:, :, 20:], value[:, :, 20:])
    whole = pi_attention(query, key, value, pattern, segment_ids=ids, impl="reference")
    torch.testing.assert_close(pi_attention(query[:, :, 20:], *seen, pattern, segment_ids=of_keys), whole[:, :, 20:])


@pytest.mark.parametrize("record", [True, False])
def test_a_document_that_is_taken_back_leaves_the_sinks_of_the_one_before(record):
    query, key, value = tokens(42, batch=1)
    pattern, one = PiPattern(4, 5, 3, sinks=2), torch.zeros(1, 42, dtype=torch.int32)
    other = torch.full((1, 1), 40, dtype=torch.int32)  # starts at token 40
    whole, cache = pi_attention(query, key, value, pattern, impl="reference"), LayerCache(pattern)
    if record:
        cache.record()
    cache.extend(key[:, :, :40].clone(), value[:, :, :40].clone(), one[:, :40])
    cache.crop(0)
    cache.extend(key[:, :, :1], value[:, :, :1], other)
    cache.crop(1)
    *seen, of_keys = cache.extend(key[:, :, 40:41], value[:, :, 40:41], one[:, :1])
    torch.testing.assert_close(
        pi_attention(query[:, :, 40:41], *seen, pattern, segment_ids=of_keys), whole[:, :, 40:41]
    )
    for _ in range(2):
        cache.extend(key[:, :, :1], value[:, :, :1], other + 1)
    if not record:
        with pytest.raises(ValueError, match=r"record\(\)"):
            cache.crop(2)
        return
    cache.crop(2)
    *seen, of_keys = cache.extend(key[:, :, 41:], value[:, :, 41:], one[:, :1])
    torch.testing.assert_close(pi_attention(query[:, :, 41:], *seen, pattern, segment_ids=of_keys), whole[:, :, 41:])


@torch.no_grad()  # where a buffer has room, so that tokens beyond the reach are kept a while
def test_a_crop_to_a_document_whose_sinks_are_gone_is_refused():
    cache, new = LayerCache(PiPattern(4, 5, 3, sinks=2)), torch.randn(1, 1, 1, 4)
    for _ in range(30):
        cache.extend(new, new, torch.zeros(1, 1, dtype=torch.int32))
    for _ in range(2):  # the second of them puts the document of the first into the sink slots
        cache.extend(new, new, torch.full((1, 1), 30, dtype=torch.int32))
    with pytest.raises(ValueError, match="sinks before token 31 are gone"):
        cache.crop(2)
    cache.crop(1)


def test_a_sequence_that_is_taken_back_whole_leaves_an_empty_cache():
    cache, new = LayerCache(PiPattern(4, 5, 3)), torch.randn(1, 1, 5, 4)
    cache.extend(new, new, torch.zeros(1, 5, dtype=torch.int32))
    cache.crop(5)
    assert (cache.length, cache.keys) == (0, None)
    cache.update(new, new)


def test_a_crop_into_forgotten_tokens_is_refused():
    cache = LayerCache(PiPattern(4, 5, 3))
    for _ in range(60):
        cache.update(*(torch.randn(1, 1, 1, 4) for _ in range(2)))
    cache.crop(1)  # the last update has forgotten nothing that this needs
    with pytest.raises(ValueError, match="record"):
        cache.crop(5)
    with pytest.raises(ValueError, match="cannot forget"):
        cache.crop(-1)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_reordered_rows(pattern):
    query, key, value = tokens(80, batch=3)
    order = torch.tensor([2, 0, 0])
    cache = LayerCache(pattern)
    cached(pattern, query, key, value, [40], cache=cache)
    cache.reorder(order)
    past = [x[order] for x in (query, key, value)]
    whole = pi_attention(*past, pattern, impl="reference")
    torch.testing.assert_close(cached(pattern, *past, [1] * 40, cache=cache), whole[:, :, 40:])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradients_flow_through_the_cache(pattern):
    query, key, value = (x.requires_grad_() for x in tokens(40))
    out = cached(pattern, query, key, value, [13, 1, 20, 6])
    whole = pi_attention(query, key, value, pattern, impl="reference")
    for a, b in zip(
        torch.autograd.grad(out.pow(2).sum(), (query, key, value)),
        torch.autograd.grad(whole.pow(2).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradients_of_queries_alone_flow_beside_the_cache(pattern):
    query, key, value = tokens(40)  # as where adapters train the query projection alone
    query.requires_grad_()
    whole = pi_attention(query, key, value, pattern, impl="reference")
    (want,) = torch.autograd.grad(whole.square().sum(), query)
    (got,) = torch.autograd.grad(cached(pattern, query, key, value, [20, 1, 1, 9, 9]).square().sum(), query)
    torch.testing.assert_close(got, want)


def test_reset_and_bidirectional_patterns():
    cache = LayerCache(PiPattern(4, 5, 3, sinks=2))
    cache.update(torch.randn(1, 1, 9, 4), torch.randn(1, 1, 9, 4))
    cache.reset()
    assert (cache.length, cache.nbytes, cache.keys) == (0, 0, None)
    with pytest.raises(ValueError, match="causal"):
        LayerCache(PiPattern(4, 5, 3, causal=False))
    with pytest.raises(TypeError, match="PiPattern"):
        LayerCache(None)


def test_a_static_cache_takes_another_model_after_a_reset():
    pattern = PATTERNS[1]
    cache = StaticLayerCache(pattern, 30)
    single = torch.float32
    for dtype, heads, dim in ((torch.float64, 2, 4), (single, 2, 4), (single, 1, 4), (single, 1, 6)):
        query, key, value = (x.to(dtype) for x in tokens(9, heads=heads, dim=dim))
        cache.extend(key[:, :, :8], value[:, :, :8])
        *kept, ids = cache.extend(key[:, :, 8:], value[:, :, 8:])
        whole = pi_attention(query, key, value, pattern, impl="reference")
        torch.testing.assert_close(pi_attention(query[:, :, 8:], *kept, pattern, segment_ids=ids), whole[:, :, 8:])
        cache.reset()


def test_tokens_of_another_shape_are_refused():
    cache, new = LayerCache(PiPattern(4, 5, 3)), torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="one shape"):
        cache.update(new, new[:, :, 1:])
    cache.update(new, new)
    for other in (new.expand(3, 2, 4, 8), new[:, :1], new[..., :4]):
        with pytest.raises(ValueError, match=r"must be \[1, 2, T, 8\]"):
            cache.update(other, other)
    assert cache.length == 4


@pytest.mark.parametrize("padded", [False, True])
def test_compiled_decoding_stops_compiling(padded):
    torch._dynamo.reset()
    pattern = PiPattern(4, 5, 3, sinks=2)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(LayerCache.extend, fullgraph=True, backend=counter)
    x = torch.randn(2, 1, 200, 8)
    ids = torch.zeros(2, 200, dtype=torch.int32)
    ids[0, :3] = -1
    caches = LayerCache(pattern), LayerCache(pattern)
    with torch._dynamo.config.patch(recompile_limit=8):  # beyond it fullgraph is an error
        for start, end in [(0, 7), *((t, t + 1) for t in range(7, 200))]:
            new = x[:, :, start:end], x[:, :, start:end], ids[:, :end] if padded else None
            extend = compiled if start else LayerCache.extend
            for found, wanted in zip(extend(caches[0], *new), LayerCache.extend(caches[1], *new), strict=True):
                assert wanted is found is None or torch.equal(found, wanted)
    assert 0 < counter.frame_count <= 8


@pytest.mark.parametrize("sinks", [0, 3])
def test_a_static_cache_that_follows_one_of_its_pattern_is_like_one_of_its_own(sinks):
    pattern, tokens = PiPattern(3, 4, 2, sinks=sinks), [9, 1, 1, 4, 1, 1, 1]
    alone, first = StaticLayerCache(pattern, 40), StaticLayerCache(pattern, 40)
    second = FollowingLayerCache(first)
    ids = torch.tensor([[0] * 5 + [5] * 13, [0] * 18])
    for end, count in zip(itertools.accumulate(tokens), tokens, strict=True):
        new = torch.randn(2, 2, 1, count, 4)
        first.extend(*torch.randn(2, 2, 1, count, 4), ids[:, end - count : end])
        for got, want in zip(second.extend(*new), alone.extend(*new, ids[:, end - count : end]), strict=True):
            assert torch.equal(got, want)
    index = torch.tensor([1, 1])
    for cache in (first, second, alone):
        cache.reorder(index)
    assert torch.equal(second.keys, alone.keys) and torch.equal(second.ids, alone.ids)
    assert second.nbytes < first.nbytes == alone.nbytes


@pytest.mark.parametrize("make", [LayerCache, lambda pattern: StaticLayerCache(pattern, 40)], ids=["growing", "static"])
def test_tokens_of_another_batch_are_refused(make):
    cache = make(PiPattern(4, 4, 2))
    cache.extend(*torch.randn(2, 2, 3, 5, 8))
    for shape in ((1, 3, 1, 8), (3, 3, 1, 8), (2, 1, 1, 8), (2, 3, 1, 4)):
        with pytest.raises(ValueError, match=r"must be \[2, 3, T, 8\], as the tokens before it"):
            cache.extend(*torch.randn(2, *shape))


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_token_may_be_taken_back_where_the_window_is_one(sinks):
    pattern, (query, key, value) = PiPattern(1, 1, 0, sinks=sinks), tokens(80)
    ids = (torch.arange(80) >= 3).int().expand(2, -1)
    cache, taken = LayerCache(pattern), 0
    with torch.no_grad():
        cache.extend(key[:, :, :5], value[:, :, :5], ids[:, :5])
        for end in range(6, 80):
            cache.extend(key[:, :, end - 1 : end], value[:, :, end - 1 : end])
            copy = deepcopy(cache)
            try:
                copy.crop(1)
            except ValueError:
                continue
            taken += 1
            seen = copy.extend(key[:, :, end : end + 1], value[:, :, end : end + 1])
            got = pi_attention(query[:, :, end : end + 1], *seen[:2], pattern, segment_ids=seen[2])
            places = [*range(end - 1), end]
            whole = [x[:, :, places] for x in (query, key, value)]
            want = pi_attention(*whole, pattern, segment_ids=ids[:, places], impl="reference")[:, :, -1:]
            torch.testing.assert_close(got, want)
    assert taken > 60
