"""The planner against exhaustive search on small contexts, and its promises on large ones."""

import itertools

import pytest

from pi_attention import PiPattern
from pi_attention.planner import fewest_keys, plan
from pi_attention.receptive_field import receptive_field


def fewest_by_search(context, hops, heads):
    """The fewest keys of all patterns, by trying each."""
    for keys in itertools.count(1):
        for window in range(1, keys + 1):
            skips = keys - window
            periods = range(1, context + 1) if skips else [1]
            for chosen in itertools.combinations_with_replacement(periods, heads):
                pattern = PiPattern(window, chosen if heads > 1 else chosen[0], skips)
                if receptive_field([pattern] * hops, context).covered() == context:
                    return keys


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_one_period_is_optimal(hops):
    for context in range(1, 50):
        found = fewest_keys(context, hops)
        assert receptive_field([found.pattern] * hops, context).covered() == context
        assert found.keys == fewest_by_search(context, hops, 1), context


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_two_periods_are_at_most_one_key_from_the_optimum(hops):
    for context in range(1, 20):
        found = fewest_keys(context, hops, heads=2)
        assert receptive_field([found.pattern] * hops, context).covered() == context
        assert found.keys - fewest_by_search(context, hops, 2) in (0, 1), context


@pytest.mark.parametrize("context", [1000, 131072, 1 << 20])
@pytest.mark.parametrize("heads", [1, 16])
def test_large_contexts_are_covered_exactly(context, heads):
    for hops in (2, 3, 5, 8):
        found = fewest_keys(context, hops, heads=heads)
        assert receptive_field([found.pattern] * hops, context).covered() == context
        if hops == 2 and heads == 1:
            assert abs(found.keys - 2 * context**0.5) < 3
            assert abs(found.pattern.window - context**0.5) < context**0.5 / 5


def test_budget_and_hops():
    assert plan(131072, 24, budget=256).hops == 6
    assert plan(131072, 24, budget=256, heads=16).hops == 3
    assert plan(131072, 24, hops=2).keys == 724
    assert plan(131072, 24, hops=2, sinks=4).pattern.sinks == 4
    with pytest.raises(ValueError, match=r"budget=100 .* takes 724: raise the budget or the hops"):
        plan(131072, 24, budget=100, hops=2)
    with pytest.raises(ValueError, match="hops=9 must lie between 1 and the number of layers, 4"):
        plan(1000, 4, hops=9)
    with pytest.raises(ValueError, match="give a budget"):
        plan(1000, 4)
    with pytest.raises(ValueError, match="context must be at least 1"):
        fewest_keys(0, 2)
