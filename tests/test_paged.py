"""Decoding over a table of slots: each request as if its keys lay in order, wherever they lie."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DEVICE, assert_close, need_triton

from pi_attention import PiPattern, pi_attention
from pi_attention.ops.paged import Pages, paged_attention

PATTERNS = [
    PiPattern(4, 5, 3),
    PiPattern(4, 5, 3, sinks=2),
    PiPattern(7, (3, 11, 5, 4), 2, sinks=3),
    PiPattern(1, 1, 0),
    PiPattern(3, 4, None, sinks=1),
    PiPattern(5, 4, 3, sinks=1, phase=(3, 2, 0, 1)),
]


def requests(lengths, dim=8, heads=4, groups=2, seed=0):
    """Queries, gates, and keys in order of each request; and the slots where they lie, with NaN in all others."""
    random = torch.Generator().manual_seed(seed)
    query, gate = (torch.randn(len(lengths), heads, 1, *d, generator=random, dtype=torch.float64) for d in ([dim], []))
    slots = torch.randperm(2 * sum(lengths) + 3, generator=random)[: sum(lengths)]
    stores = torch.full((2, 2 * sum(lengths) + 3, groups, dim), torch.nan, dtype=torch.float64)
    stores[:, slots] = torch.randn(2, len(slots), groups, dim, generator=random, dtype=torch.float64)
    return query, gate, stores, slots


def one_by_one(query, gate, stores, slots, lengths, pattern, **options):
    outs, done = [], 0
    for row, length in enumerate(lengths):
        key, value = (x[slots[done : done + length]].transpose(0, 1)[None] for x in stores)
        of_gate = None if gate is None else gate[row : row + 1]
        outs.append(pi_attention(query[row : row + 1], key, value, pattern, gate=of_gate, impl="reference", **options))
        done += length
    return torch.cat(outs)


def together(impl, query, gate, stores, slots, lengths, pattern, **options):
    device, dtype = ("cpu", torch.float64) if impl != "triton" else (DEVICE, torch.float32)
    query, gate, (key, value) = (None if x is None else x.to(device, dtype) for x in (query, gate, stores))
    pages = Pages.of(lengths, slots.to(device))
    options = {name: x.to(device, dtype) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return paged_attention(query, key, value, pages, pattern, gate=gate, impl=impl, **options).to("cpu", torch.float64)


@pytest.fixture(params=["blocked", "triton", "auto"])
def way(request):
    if request.param == "triton":
        need_triton()
    return request.param


@pytest.mark.parametrize("lengths", [(1,), (37,), (3, 40, 1, 111, 19), (20, 20, 20)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_request_is_as_if_alone(pattern, lengths, way, poisoned_memory):
    problem = requests(lengths)
    assert_close(together(way, *problem, lengths, pattern), one_by_one(*problem, lengths, pattern), way)


SCORES = {"sink_logit": torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64), "softcap": 1.5}


@pytest.mark.parametrize(
    "options",
    [{"fusion": "mass"}, {"scale": 0.3}, {"scale": -0.2}, {"gate": None}, SCORES, SCORES | {"fusion": "mass"}],
    ids=str,
)
def test_options_are_those_of_the_operator(options, way):
    lengths, (query, gate, *keys) = (30, 9, 50), requests((30, 9, 50))
    gate = options.pop("gate", gate)
    got = together(way, query, gate, *keys, lengths, PATTERNS[1], **options)
    assert_close(got, one_by_one(query, gate, *keys, lengths, PATTERNS[1], **options), way)


@pytest.mark.parametrize(("heads", "groups", "dim"), [(8, 1, 24), (3, 3, 16), (6, 2, 80)])
def test_any_group_and_head_dim(heads, groups, dim, way):
    lengths, problem = (30, 9), requests((30, 9), dim, heads, groups)
    assert_close(together(way, *problem, lengths, PATTERNS[1]), one_by_one(*problem, lengths, PATTERNS[1]), way)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5), pattern=st.sampled_from(PATTERNS))
def test_gathered_keys_give_the_same_for_any_lengths(lengths, pattern):
    problem = requests(lengths)
    assert_close(together("blocked", *problem, lengths, pattern), one_by_one(*problem, lengths, pattern))


def test_the_kernels_find_the_same_in_keys_that_are_ordered_and_in_a_table():
    need_triton()
    pattern, (query, gate, *_) = PATTERNS[2], requests((64,))
    query, gate = (x.to(DEVICE, torch.float32) for x in (query, gate))
    key, value = torch.randn(2, 64, 2, 8, device=DEVICE)
    pages = Pages.of([64], torch.arange(64, device=DEVICE))
    got = paged_attention(query, key, value, pages, pattern, gate=gate, impl="triton")
    keys, values = (x.transpose(0, 1)[None] for x in (key, value))
    with torch.no_grad():
        assert torch.equal(got, pi_attention(query, keys, values, pattern, gate=gate, impl="triton"))


def test_kernels_that_are_named_and_cannot_serve_are_refused():
    need_triton()
    double = requests((9,), heads=128, groups=1)[0].to(DEVICE)
    pages = Pages.of([9], torch.arange(9, device=DEVICE))
    query, key, value = double.float().requires_grad_(), *torch.randn(2, 9, 1, 8, device=DEVICE)
    for given_query in (query, query.detach()):
        with pytest.raises(NotImplementedError, match='impl="triton" cannot serve this call: many heads of a group'):
            paged_attention(given_query, key, value, pages, PiPattern(4, 4, 2), impl="triton")
    with pytest.raises(NotImplementedError, match="float64"):
        paged_attention(double, key.double(), value.double(), pages, PiPattern(4, 4, 2), impl="triton")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"softcap": 0.0}, "softcap must be finite and above 0, got 0.0"),
        ({"softcap": -1.0}, "softcap must be finite and above 0, got -1.0"),
        ({"softcap": float("nan")}, "softcap must be finite and above 0, got nan"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"sink_logit": torch.zeros(1)}, r"sink_logit must be \[H\] = \(4,\), got \(1,\)"),
        ({"gate": torch.zeros(2, 1, 1)}, r"gate must be \[B, H, T\] = \(2, 4, 1\), got \(2, 1, 1\)"),
        ({"fusion": "gat"}, "fusion must be one of .* got 'gat'"),
        ({"pattern": PiPattern(4, (4, 8), 2)}, "period has 2 entries but there are 4 query heads"),
        ({"pattern": PiPattern(4, 4, 2, causal=False)}, "pattern has causal=False"),
        ({"query": torch.zeros(3, 4, 1, 8)}, r"query must be \[N, H, 1, D\] with N = 2, .* got \(3, 4, 1, 8\)"),
        ({"query": torch.zeros(2, 4, 2, 8)}, r"query must be \[N, H, 1, D\] with N = 2, .* got \(2, 4, 2, 8\)"),
    ],
)
def test_wrong_arguments_are_named_before_a_kernel_or_a_gathered_key(arguments, words, way):
    key, value = torch.zeros(2, 14, 2, 8)
    call = {"query": torch.zeros(2, 4, 1, 8), "pattern": PiPattern(4, 4, 2)} | arguments
    call = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    pages = Pages.of((9, 5), torch.arange(14, device=DEVICE))
    with pytest.raises(ValueError, match=words):
        paged_attention(key=key.to(DEVICE), value=value.to(DEVICE), pages=pages, impl=way, **call)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(((14, 2, 4),) * 2, ((14, 2, 16),) * 2, ((14, 3, 8),) * 2, ((14, 8),) * 2, ((14, 2, 8), (14, 1, 8))),
    ],
    ids=str,
)
def test_no_kernel_reads_beside_keys_of_another_shape(key, value, way):
    pages = Pages.of((9, 5), torch.arange(14, device=DEVICE))
    words = re.escape(f"key {key} and value {value} must be [slots, G, D], with the query's D = 8")
    query, key, value = (torch.zeros(shape, device=DEVICE) for shape in ((2, 4, 1, 8), key, value))
    with pytest.raises(ValueError, match=words):
        paged_attention(query, key, value, pages, PiPattern(4, 4, 2), impl=way)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_no_tensor_or_of_another_dtype_is_named(name, way):
    pages = Pages.of((9, 5), torch.arange(14, device=DEVICE))
    shapes = {"query": (2, 4, 1, 8), "key": (14, 2, 8), "value": (14, 2, 8)}
    given = {other: torch.zeros(shape, device=DEVICE) for other, shape in shapes.items()}
    with pytest.raises(TypeError, match=f"{name} must be a Tensor .*, got NoneType"):
        paged_attention(**given | {name: None}, pages=pages, pattern=PiPattern(4, 4, 2), impl=way)
    with pytest.raises(TypeError, match=r"has dtype torch\.float\d+ but query has torch\.float"):
        paged_attention(**given | {name: given[name].half()}, pages=pages, pattern=PiPattern(4, 4, 2), impl=way)


@pytest.mark.parametrize(("lengths", "slots"), [((9, 5), 13), ((0, 5), 5), ((), 0)])
def test_every_key_has_a_slot_and_every_request_a_key(lengths, slots):
    with pytest.raises(ValueError, match=rf"need {sum(lengths)} slots, got {slots}: give each request at least"):
        Pages.of(lengths, torch.arange(slots))


def test_a_pattern_that_is_none_is_named():
    with pytest.raises(TypeError, match="PiPattern"):
        paged_attention(torch.zeros(1, 4, 1, 8), *torch.zeros(2, 9, 2, 8), Pages.of([9], torch.arange(9)), "local")


def test_a_strided_sink_logit_is_read_as_it_is(way):
    lengths, problem = (30, 9), requests((30, 9))
    base = torch.tensor([[0.3, 7.0], [-1.0, 7.0], [2.0, 7.0], [0.0, 7.0]], dtype=torch.float32)
    device, dtype = ("cpu", torch.float64) if way != "triton" else (DEVICE, torch.float32)
    query, gate, (key, value) = (x.to(device, dtype) for x in problem[:3])
    pages = Pages.of(lengths, problem[3].to(device))
    sink = base.to(device)[:, 0]
    got = paged_attention(query, key, value, pages, PATTERNS[1], gate=gate, sink_logit=sink, impl=way)
    want = one_by_one(*problem, lengths, PATTERNS[1], sink_logit=base[:, 0])
    assert_close(got.to("cpu", torch.float64), want, way)
