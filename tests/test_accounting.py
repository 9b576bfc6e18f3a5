from hypothesis import given
from problems import cases

from pi_attention import PiPattern
from pi_attention.accounting import attention_flops, cache_bytes, cache_tokens, dense_flops, visible_pairs
from pi_attention.cache import LayerCache
from pi_attention.masks import dense_masks


@given(cases())
def test_pairs_are_those_of_the_dense_masks(case):
    local, skip = dense_masks(case.pattern, case.S, case.S)
    for head in range(len(case.pattern.periods)):
        assert visible_pairs(case.pattern, case.S, head=head) == (int(local.sum()), int(skip[0, head].sum()))


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
            assert key.shape[2] == cache_tokens(pattern, length - 1) + 1
    assert cache_bytes(PiPattern(4, 5, 3), 1000, kv_heads=2, head_dim=8) == 2 * 15 * 2 * 8 * 2
