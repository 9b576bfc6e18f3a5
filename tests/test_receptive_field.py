"""Exact receptive fields against a walk over the graph of visible keys, and against the gradients of real networks."""

import itertools
import math
import time
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pi_attention import PiPattern
from pi_attention.heads import coordinated_heads, coprime_periods, dilated_heads, geometric_periods
from pi_attention.receptive_field import (
    intervals_of,
    joint_coverage,
    key_density,
    keys_read,
    paths,
    positions_of,
    receptive_field,
)
from pi_attention.stack import stacked


@st.composite
def stacks(draw):
    """A few layers over a short sequence, and a query."""
    context = draw(st.integers(1, 40))
    causal = draw(st.booleans())
    ring = not causal and draw(st.booleans())
    divisors = [d for d in range(1, context + 1) if context % d == 0] if ring else list(range(1, 13))
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        periods = draw(st.lists(st.sampled_from(divisors), min_size=1, max_size=3))
        phases = tuple(draw(st.integers(0, period - 1)) for period in periods)
        phase = draw(st.sampled_from([0, phases]))
        if len(periods) == 1:
            phase = draw(st.sampled_from([0, phases[0]]))
        layers.append(
            PiPattern(
                draw(st.integers(1, 9)),
                tuple(periods) if len(periods) > 1 else periods[0],
                draw(st.sampled_from([0, 1, 2, 3, None])),
                causal=causal,
                ring=ring,
                sinks=draw(st.integers(0, 3)) if causal else 0,
                phase=phase,
            )
        )
    return layers, context, draw(st.integers(0, context - 1))


def walked(layers, context, query):
    """The positions seen after each layer from the output down, one key at a time."""
    seen = [{query}]
    for pattern in reversed(layers):
        step = set(seen[-1])
        for position in seen[-1]:
            for head in range(len(pattern.periods)):
                local, skip = pattern.keys(position, context, head=head)
                step |= {*local, *skip}
        seen.append(step)
    return seen


@settings(max_examples=300, deadline=None)
@given(stack=stacks())
def test_coverage_equals_a_walk_over_the_graph(stack):
    layers, context, query = stack
    field = receptive_field(layers, context, query)
    want = walked(layers, context, query)
    for bits, positions in zip(field.seen, want, strict=True):
        assert set(positions_of(bits)) == positions
    hops = field.hops()
    for position in range(context):
        reached = [n for n, positions in enumerate(want) if position in positions]
        assert hops[position] == (reached[0] if reached else -1)
    assert field.covered() == len(want[-1])
    assert field.reach() == query - min(want[-1])
    lags = {query - p for p in want[-1]}
    inside = {lag for first, last in field.holes() for lag in range(first, last + 1)}
    assert inside == {lag for lag in range(field.reach() + 1) if lag not in lags}


@settings(max_examples=60, deadline=None)
@given(stack=stacks())
def test_paths_are_counted_as_a_walk_counts_them(stack):
    layers, context, _ = stack
    assume(layers[0].causal)
    layers = [replace(pattern, sinks=0) for pattern in layers]
    counts = {context - 1: 1}
    for pattern in reversed(layers):
        after: dict[int, int] = {}
        for position, ways in counts.items():
            for head in range(len(pattern.periods)):
                local, skip = pattern.keys(position, context, head=head)
                for key in local + skip:
                    after[key] = after.get(key, 0) + ways
        counts = after
    assert paths(layers, context) == [counts.get(context - 1 - lag, 0) for lag in range(context)]


def heads_of_lag(pattern, context):
    """For each lag the heads that see it, by asking about one key after another."""
    lags = context // 2 + 1 if pattern.ring else context
    return [
        sum(
            bool(pattern.sees_local(lag, 0, length=context) or pattern.sees_skip(lag, 0, head=head, length=context))
            for head in range(len(pattern.periods))
        )
        for lag in range(lags)
    ]


@settings(max_examples=200, deadline=None)
@given(stack=stacks())
def test_joint_coverage_and_key_density_are_those_of_the_keys(stack):
    layers, context, _ = stack
    pattern = replace(layers[0], sinks=0)
    heads = heads_of_lag(pattern, context)
    found = joint_coverage(layers[0], context)
    seen = {lag for lag, count in enumerate(heads) if count}
    assert set(positions_of(found.seen)) == seen and found.covered() == len(seen)
    assert found.reach == max(seen) and found.lags == len(heads)
    assert found.stretch == next((lag for lag, count in enumerate(heads) if not count), len(heads))
    inside = {lag for first, last in found.holes() for lag in range(first, last + 1)}
    assert inside == set(range(found.reach)) - seen
    octaves = key_density(layers[0], context)
    assert [lag for first, last, _ in octaves for lag in range(first, last + 1)] == list(range(len(heads)))
    for first, last, density in octaves:
        assert density == Fraction(sum(heads[first : last + 1]), (last - first + 1) * len(pattern.periods))


@settings(max_examples=200, deadline=None)
@given(stack=stacks(), groups=st.integers(1, 3))
def test_keys_read_are_those_that_the_heads_of_a_group_see(stack, groups):
    layers, length, _ = stack
    pattern = layers[0]
    assume(pattern.causal)
    size = len(pattern.periods)
    heads = size if pattern.per_head else groups * size
    for kv_heads in (n for n in range(1, heads + 1) if heads % n == 0):
        want = 0
        for first in range(0, heads, heads // kv_heads):
            of_group = range(first, first + heads // kv_heads)
            parts = [pattern.keys(length - 1, length, head=head % size) for head in of_group]
            want += len({key for local, skip in parts for key in local + skip})
        assert keys_read(pattern, length, heads=heads, kv_heads=kv_heads) == want


@pytest.mark.parametrize("window", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("period", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("skips", [0, 1, 2, 5])
def test_the_theorem_of_coordinated_heads(window, period, skips):
    """All phases: the window of w + m·p lags, each lag beyond w once. Fewer phases: so many classes of lags."""
    context = window + skips * period + 3 * period
    whole = heads_of_lag(coordinated_heads(window, skips, period, period), context)
    reach = window + skips * period
    assert whole == [period] * window + [1] * (reach - window) + [0] * (context - reach)
    for count in range(1, period):
        for phases in itertools.combinations(range(period), count):
            some = heads_of_lag(PiPattern(window, (period,) * count, skips, phase=phases), context)
            want = [lag % period in phases and lag < reach for lag in range(window, context)]
            assert some[:window] == [count] * window
            assert some[window:] == want
            if skips:  # the first hole is the first lag beyond the window whose phase is missing
                hole = next(lag for lag in range(window, context) if lag % period not in phases)
                found = joint_coverage(PiPattern(window, (period,) * count, skips, phase=phases), context)
                assert hole < window + period and found.stretch == hole


def spans(field):
    """How many lags from 0 on are seen without a hole."""
    holes = field.holes()
    return holes[0][0] if holes else field.reach() + 1


def test_the_coverage_theorem_for_any_first_skip():
    """If c₀π ≤ b(w − 1) + 1, a skips and b local hops see every lag below aπ(c₀ + m − 1) + b(w − 1) + 1."""
    told = 0
    for window, period, skips, layers in itertools.product(range(1, 9), range(1, 10), range(1, 5), range(1, 5)):
        first = max(1, -(-window // period))
        stack = [PiPattern(window, period, skips)] * layers
        for local in range(layers + 1):
            if first * period <= local * (window - 1) + 1:
                promised = (layers - local) * period * (first + skips - 1) + local * (window - 1) + 1
                assert spans(receptive_field(stack, promised + 50)) >= promised
                told += first > 1
        if first > 1:
            assert first * period <= 2 * (window - 1) + 1  # so two local hops always do
    assert told > 500  # the case that the old statement left out


@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize("period", [4, 6, 7])
def test_two_layers_close_the_holes_of_missing_phases(window, period):
    """If no gap between phases, around the period, is more than the window: every lag below w + m·p."""
    for count in range(1, period + 1):
        for phases in itertools.combinations(range(period), count):
            gaps = [after - before for before, after in itertools.pairwise([*phases, phases[0] + period])]
            pattern = PiPattern(window, (period,) * count, 3, phase=phases)
            if max(gaps) <= window:
                assert spans(receptive_field([pattern] * 2, 100)) >= window + 3 * period


def test_for_which_patterns_the_paper_s_bound_holds():
    """R(L) ≤ kL + π⌈log₂L⌉ at every depth exactly if a layer reaches no further than k: m = 0, or m = 1 and π | k."""
    for window, period, skips in itertools.product(range(1, 17), range(1, 40), range(4)):
        reach = PiPattern(window, period, skips).reach
        depths = [1, 2, 3, 5, 8, 100, 1 << 20]
        kept = [depth * reach <= window * depth + period * (depth - 1).bit_length() for depth in depths]
        tight = skips == 0 or (skips == 1 and window % period == 0)
        assert tight == (reach <= window)
        assert all(kept) if tight else not kept[0] and not kept[-1]
        if skips > 1 and period >= window:
            assert not any(kept)
        if skips:  # as a lower bound it holds up to a factor of two
            for depth in depths:
                assert 2 * depth * reach + depth >= window * depth + period * (depth - 1).bit_length()
    broken = [n for n in range(2, 99) if n * 128 > 64 * n + 128 * (n - 1).bit_length()]
    assert broken[0] == 7 and 6 * PiPattern(64, 64, 1).reach == 384 <= 64 * 6 + 64 * 3 == 576
    assert 6 * PiPattern(64, 64, 16).reach == 6144


def test_a_harmonic_schedule_over_layers_has_the_paper_s_bound():
    for window, period, layers in itertools.product((1, 8, 64), (64, 200, 4096), (1, 2, 6, 24)):
        stack = [PiPattern(window, max(1, period // number), 1) for number in range(1, layers + 1)]
        stack = [pattern if pattern.period > window else PiPattern(window, 1, 0) for pattern in stack]
        reach = receptive_field(stack, 1 << 17).reach()
        assert reach == sum(max(window - 1, period // n if period // n > window else 0) for n in range(1, layers + 1))
        assert reach <= window * layers + period * (1 + math.log(layers))


@settings(max_examples=100, deadline=None)
@given(stack=stacks())
def test_densities_add_up_to_the_keys(stack):
    pattern = replace(stack[0][0], sinks=0, causal=True, ring=False)
    pattern = replace(pattern, skips=3 if pattern.skips is None else pattern.skips)
    ranges = key_density(pattern, 400, [0, 1, 7, 50])
    assert [first for first, _, _ in ranges] == [0, 1, 7, 50] and ranges[-1][1] == 399
    assert sum(share * (last - first + 1) for first, last, share in ranges) == pattern.window + pattern.skips


def test_layers_of_coordinated_heads_add_up_as_windows_do():
    """Through L layers of stretch W: every lag up to L(W − 1), and not one more."""
    pattern = coordinated_heads(window=16, skips=64, heads=4)
    field = receptive_field([pattern] * 6, 4096)
    for layers in range(7):
        assert field.covered(layers) == field.reach(layers) + 1 == layers * (272 - 1) + 1


def test_the_density_of_the_measured_patterns():
    """What orders the measured perplexities: keys a lag, of 80 keys a query and four heads."""
    dense = {first: round(float(share), 3) for first, _, share in key_density(coordinated_heads(16, 64, 4), 2048)}
    assert [dense[first] for first in (0, 16, 32, 64, 128, 256)] == [1, 0.25, 0.25, 0.25, 0.25, 0.016]
    dilated = {first: round(float(share), 3) for first, _, share in key_density(dilated_heads(16, 64, 4, 2048), 2048)}
    assert [dilated[first] for first in (0, 16, 32, 64, 128)] == [1, 0.375, 0.375, 0.184, 0.09]
    single = joint_coverage(PiPattern(64, 64, 16), 2048)
    assert single.stretch == 65 and len(single.holes()) == 15 and single.covered() == 80


@given(st.integers(0, 1 << 70))
def test_intervals_are_the_set(bits):
    assert sum((1 << end) - (1 << start) for start, end in intervals_of(bits)) == bits


def test_a_bidirectional_query_has_seen_everything_when_it_has_seen_both_sides():
    field = receptive_field([PiPattern(3, 3, 0, causal=False)] * 6, 12, query=0)
    assert field.layers_to_cover() == 6 and field.covered(1) == 3


def test_ring_local_reach_is_the_paper_s():
    for window, layers in [(1, 3), (5, 4), (64, 12)]:
        field = receptive_field([PiPattern(window, 1, 0)] * layers, 4096)
        assert field.reach() == layers * (window - 1)
        assert field.covered() == field.reach() + 1


def test_reach_grows_linearly_in_depth_with_the_stated_slope():
    pattern = PiPattern(10, 7, 5)
    field = receptive_field([pattern] * 6, 4096)
    assert [field.reach(n) for n in range(7)] == [n * pattern.reach for n in range(7)]
    assert pattern.reach == max(10 - 1, (2 + 5 - 1) * 7)


@pytest.mark.parametrize("window", [3, 8, 17])
@pytest.mark.parametrize("skips", [1, 4])
def test_a_period_up_to_the_window_leaves_no_hole_after_a_local_hop(window, skips):
    for period in range(1, window + 1):
        if -(-window // period) == 1:  # the first skip follows the window directly
            field = receptive_field([PiPattern(window, period, skips)] * 2, 4096)
            assert not [hole for hole in field.holes() if hole[0] < skips * period + window]
    assert receptive_field([PiPattern(window, 3 * window, skips)] * 2, 4096).holes()


def test_coprime_and_geometric_heads_cover_more_than_one_period():
    one = receptive_field([PiPattern(8, 64, 4)] * 3, 65536)
    several = receptive_field([PiPattern(8, coprime_periods(64, 4), 4)] * 3, 65536)
    geometric = receptive_field([PiPattern(8, geometric_periods(8, 8 * 5**3, 4), 4)] * 5, 65536)
    assert one.covered() < several.covered()
    assert not [first for first, _ in geometric.holes() if first < 8 * 5**4]  # a number of base 5, a digit a layer
    assert several.covered() < 8 * 5**4 <= geometric.covered()


def test_a_million_tokens_and_48_layers_take_less_than_a_few_seconds():
    heads = coprime_periods(1024, 16)
    layers = [PiPattern(1024, heads, 32, sinks=4)] * 48
    begun = time.perf_counter()
    field = receptive_field(layers, 1 << 20)
    field.hops()
    some = joint_coverage(replace(layers[0], skips=None), 1 << 20)
    assert len(some.holes()) > 1000 and some.covered() > 1 << 12
    assert key_density(layers[0], 1 << 20)[0][2] == 1
    assert time.perf_counter() - begun < 20  # 0.5 s alone; machines are shared
    assert field.covered() == 1 << 20


def test_skips_beyond_the_sequence_take_no_memory():
    pattern = PiPattern(2**40, 128, 16)  # 2**40 bits are 128 GiB
    assert joint_coverage(pattern, 64).stretch == 64
    assert keys_read(pattern, 64, heads=2) == 128
    assert receptive_field([pattern], 64).covered() == 64


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="patterns is empty"):
        receptive_field([], 10)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        receptive_field([PiPattern(2, 2, 1)], 0)
    with pytest.raises(ValueError, match="query=10"):
        receptive_field([PiPattern(2, 2, 1)], 10, 10)
    with pytest.raises(ValueError, match="agree in causal"):
        receptive_field([PiPattern(2, 2, 1), PiPattern(2, 2, 1, causal=False)], 10)
    with pytest.raises(ValueError, match="divide the length"):
        receptive_field([PiPattern(2, 3, 1, causal=False, ring=True)], 10)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        joint_coverage(PiPattern(2, 2, 1), 0)
    with pytest.raises(ValueError, match=r"edges must increase from 0 on, got \[0, 4, 4\]"):
        key_density(PiPattern(2, 2, 1), 10, [0, 4, 4])
    with pytest.raises(ValueError, match="only causal patterns decode"):
        keys_read(PiPattern(2, 2, 1, causal=False), 10, heads=2)
    with pytest.raises(ValueError, match="kv_heads=2 must divide heads=3"):
        keys_read(PiPattern(2, 2, 1), 10, heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="without sinks"):
        paths([PiPattern(2, 2, 1, sinks=1)], 10)


def test_a_dense_layer_beside_rings_sees_the_whole_ring():
    patterns = stacked(["dense", "pi"], PiPattern(4, 4, 2, causal=False, ring=True), 2)
    assert patterns[0].ring
    assert receptive_field(patterns, 16).covered() == 16
    assert receptive_field(patterns[1:], 16).covered() < 16
