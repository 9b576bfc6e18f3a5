import itertools
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import cases
from torch.utils.flop_counter import FlopCounterMode

from pi_attention import PiPattern, pi_attention
from pi_attention.accounting import (
    attention_bytes,
    attention_flops,
    cache_bytes,
    cache_tokens,
    decoding_keys,
    dense_flops,
    model_flops,
    roofline_seconds,
    saving_over_dense,
    visible_pairs,
)
from pi_attention.cache import LayerCache
from pi_attention.heads import coordinated_heads
from pi_attention.masks import dense_masks
from pi_attention.models import PiConfig, PiForCausalLM


@given(cases())
def test_pairs_are_those_of_the_dense_masks(case):
    local, skip = dense_masks(case.pattern, case.S, case.S)
    for head in range(len(case.pattern.periods)):
        assert visible_pairs(case.pattern, case.S, head=head) == (int(local.sum()), int(skip[0, head].sum()))


@given(cases(), st.integers(0, 9))
def test_pairs_and_decoded_keys_of_heads_are_counted_key_by_key(case, sinks):
    pattern = case.pattern
    if pattern.causal:
        pattern = replace(pattern, sinks=sinks)
    for head in range(len(pattern.periods)):
        keys = [pattern.keys(query, case.S, head=head) for query in range(case.S)]
        pairs = sum(len(local) for local, _ in keys), sum(len(skip) for _, skip in keys)
        assert visible_pairs(pattern, case.S, head=head) == pairs
        if pattern.causal:
            last = len(keys[-1][0]), len(keys[-1][1])
            assert decoding_keys(pattern, case.S, head=head) == last


def test_heads_of_all_phases_and_all_skips_share_the_pairs_of_dense_attention():
    """The union over p heads is every pair once, but for the window, that each of them computes."""
    for period, window, length in itertools.product((1, 2, 4, 8), (1, 3, 16), (1, 7, 100, 257)):
        pattern = coordinated_heads(window, None, period, period)
        pairs = sum(sum(visible_pairs(pattern, length, head=head)) for head in range(period))
        assert pairs == length * (length + 1) // 2 + (period - 1) * visible_pairs(pattern, length)[0]


def test_a_layer_of_all_skips_with_phases_beside_dense():
    pattern, length = coordinated_heads(16, None, 4), 32768
    ours = attention_flops(pattern, length, heads=4, head_dim=64)
    assert 0.25 < ours / dense_flops(length, heads=4, head_dim=64) < 0.251
    assert [sum(decoding_keys(pattern, length, head=head)) for head in range(4)] == [16 + 32752 // 4] * 4
    assert cache_tokens(pattern, length) == length


def test_pairs_of_a_million_tokens_take_no_loop_over_lags():
    pattern = coordinated_heads(16, None, 64, 64, sinks=4)
    begun = time.perf_counter()
    attention_flops(pattern, 1 << 24, heads=64, head_dim=64)
    assert time.perf_counter() - begun < 1  # 0.5 ms alone


def test_flops_of_dense_attention_are_those_of_a_window_over_everything():
    for causal in (True, False):
        everything = PiPattern(100, 1, 0, causal=causal)
        assert attention_flops(everything, 64, heads=3, head_dim=8) == dense_flops(
            64, heads=3, head_dim=8, causal=causal
        )


def test_flops_sum_over_heads():
    one, other = PiPattern(4, 5, 3), PiPattern(4, 9, 3)
    both = PiPattern(4, (5, 9), 3)
    flops = [attention_flops(p, 64, heads=1, head_dim=8) for p in (one, other)]
    assert attention_flops(both, 64, heads=2, head_dim=8) == sum(flops)


def test_cost_is_linear_in_the_length():
    pattern = PiPattern(16, 16, 4)
    grow = [attention_flops(pattern, n, heads=1, head_dim=8) for n in (1000, 2000, 3000)]
    assert grow[2] - grow[1] == grow[1] - grow[0]


def test_cache_tokens_are_what_the_cache_keeps():
    import torch

    for pattern in (PiPattern(4, 5, 3), PiPattern(4, 5, 3, sinks=2), PiPattern(4, 5, None)):
        cache = LayerCache(pattern)
        for length in range(1, 60):
            key, _ = cache.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
            assert (cache.held().starts >= 0).sum() == cache_tokens(pattern, length)
            more = 64 if pattern.sinks else 0  # which are forgotten later, together
            assert 0 <= key.shape[2] - cache_tokens(pattern, length - 1) - 1 <= more
    assert cache_bytes(PiPattern(4, 5, 3), 1000, kv_heads=2, head_dim=8) == 2 * 15 * 2 * 8 * 2


def counted(run):
    """Operations by kind, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_flop_counts()["Global"]


@pytest.mark.parametrize("more", [{}, {"gate": False, "num_key_value_heads": 1}, {"gate_features": 8, "skips": 0}])
def test_flops_of_a_model_are_those_that_pytorch_counts(more):
    config = PiConfig(**{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "gate": True, "window": 8, "period": 8, "skips": 3} | more)  # fmt: skip
    model, ids = PiForCausalLM(config), torch.randint(0, 64, (1, 40))
    parts = model_flops(config.patterns(), 40, config.sizes())
    got = counted(lambda: model(ids, use_cache=False))
    linear = got.get(torch.ops.aten.mm, 0) + got.get(torch.ops.aten.addmm, 0)
    assert linear == sum(parts.values()) - parts["attention"]


def test_flops_of_the_operator_are_those_of_the_reference_s_visible_pairs():
    """The reference computes every pair of each band, and its masks say which of them are visible."""
    pattern, length, heads, dim = PiPattern(8, (5, 9), 3, sinks=1), 40, 2, 16
    tensors = [torch.randn(1, heads, length, dim) for _ in range(3)]
    got = counted(lambda: pi_attention(*tensors, pattern, impl="reference"))
    assert got[torch.ops.aten.bmm] == 2 * heads * 4 * dim * length**2
    local, skip = dense_masks(pattern, length, length)
    share = (heads * int(local.sum()) + int(skip.sum())) / (2 * heads * length**2)
    assert attention_flops(pattern, length, heads=heads, head_dim=dim) == share * got[torch.ops.aten.bmm]


def test_training_flops_are_three_and_three_and_a_half_times_the_forward_pass():
    config = PiConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    forward = model_flops(config.patterns(), 40, config.sizes())
    training = model_flops(config.patterns(), 40, config.sizes(), backward=True)
    assert training["feed-forward"] == 3 * forward["feed-forward"]
    assert training["attention"] == 7 * forward["attention"] // 2
    layer = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    mm = torch.ops.aten.mm
    assert counted(lambda: layer(x).sum().backward())[mm] == 3 * counted(lambda: layer(x))[mm]


def test_saving_over_dense_grows_with_length_and_shrinks_with_width():
    pattern = PiPattern(256, 256, 16)
    narrow = PiConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, vocab_size=50000).sizes()
    wide = PiConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, vocab_size=50000).sizes()
    savings = [saving_over_dense(pattern, length, narrow) for length in (1024, 4096, 16384)]
    assert savings == sorted(savings) and savings[-1] > saving_over_dense(pattern, 16384, wide)


def test_bytes_and_roofline():
    moved = attention_bytes(32768, heads=16, kv_heads=16, head_dim=128)
    assert moved == {"forward": 4 * 16 * 32768 * 128 * 2, "backward": 8 * 16 * 32768 * 128 * 2}
    assert roofline_seconds(10, 20, flops_per_second=5, bytes_per_second=2) == 10


def test_what_no_layer_has_is_not_counted():
    heads, ring = PiPattern(4, (2, 3, 5, 7), 3), PiPattern(4, 4, 2, causal=False, ring=True)
    for wrong in (2, 6):
        with pytest.raises(ValueError, match=f"period has 4 entries but there are {wrong} query heads"):
            attention_flops(heads, 50, heads=wrong, head_dim=8)
    for head in (-1, 4):
        with pytest.raises(ValueError, match=f"head={head} is not one of the pattern's 4 heads"):
            visible_pairs(heads, 50, head=head)
    with pytest.raises(ValueError, match="30 % 4 != 0"):
        visible_pairs(ring, 30)
    assert visible_pairs(ring, 32) == (32 * 7, 32 * 4)
