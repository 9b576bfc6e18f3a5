import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import patterns

from pi_attention import Band, PiPattern, coprime_periods, geometric_periods
from pi_attention.pattern import Band as BandOfModule


def keys_by_definition(p: PiPattern, query: int, length: int, head: int) -> tuple[set[int], set[int]]:
    """The two sets, from the sentence of the design and nothing else."""
    period = p.period_of(head)
    first = max(1, math.ceil(p.window / period))
    count = length if p.skips is None else p.skips
    lags = {c * period for c in range(first, first + count)}
    signs = [1] if p.causal else [1, -1]
    if p.ring:
        local = {(query - lag) % length for lag in range(1 - p.window, p.window)}
        skip = {(query - sign * lag) % length for lag in lags for sign in signs} - local
        return local, skip
    near = range(0, p.window) if p.causal else range(1 - p.window, p.window)
    inside = set(range(length))
    sinks = {k for k in range(p.sinks) if k <= query}
    return ({query - lag for lag in near} | sinks) & inside, {
        query - s * lag for lag in lags for s in signs
    } & inside - sinks


@given(st.data(), st.integers(1, 60))
def test_keys_follow_the_definition(data, length):
    pattern = data.draw(patterns(heads=2, length=length))
    query, head = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, 1))
    local, skip = pattern.keys(query, length, head=head)
    want_local, want_skip = keys_by_definition(pattern, query, length, head)
    assert set(local) == want_local
    assert set(skip) == want_skip
    assert not set(local) & set(skip)


@given(st.data(), st.integers(1, 60))
def test_signed_bands_are_the_lags_of_a_query(data, length):
    pattern = data.draw(patterns(heads=2, length=length))
    if pattern.sinks:
        pattern = PiPattern(pattern.window, pattern.period, pattern.skips)
    query, head = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, 1))
    for band, keys in zip(
        (pattern.local_band, pattern.skip_band(head)), pattern.keys(query, length, head=head), strict=True
    ):
        lags = [lag for signed in pattern.signed_bands(band, length) for lag in signed.lags()]
        positions = [(query - lag) % length if pattern.ring else query - lag for lag in lags]
        positions = [p for p in positions if 0 <= p < length]
        assert sorted(positions) == keys  # each once


@given(st.data(), st.integers(1, 60))
def test_predicates_agree_on_ints_and_tensors(data, length):
    pattern = data.draw(patterns(heads=2, length=length))
    position = torch.arange(length)
    local = pattern.sees_local(position[:, None], position, length=length)
    skip = pattern.sees_skip(position[:, None], position, head=1, length=length)
    for query in range(0, length, 7):
        assert (local[query].nonzero().flatten().tolist(), skip[query].nonzero().flatten().tolist()) == pattern.keys(
            query, length, head=1
        )


@given(st.data())
def test_reach_is_the_largest_lag(data):
    pattern = data.draw(
        patterns(heads=2, length=60).filter(lambda p: p.skips is not None and not p.ring and not p.sinks)
    )
    query = length = 1000
    seen = [k for head in range(2) for band in pattern.keys(query - 1, length, head=head) for k in band]
    assert pattern.reach == query - 1 - min(seen)


def test_reach_of_unbounded_skips_is_none():
    assert PiPattern(4, 4, None).reach is None


def test_bands_never_share_a_key_when_the_period_is_smaller_than_the_window():
    local, skip = PiPattern(10, 3, 2).keys(40, 41)
    assert skip == [40 - 15, 40 - 12]
    assert local == list(range(31, 41))


def test_paper_pattern_is_one_skip_at_the_period():
    assert PiPattern(4, 16, 1).keys(20, 21)[1] == [4]


def test_patterns_are_hashable_values():
    assert PiPattern(4, [3, 5], 2) == PiPattern(4, (3, 5), 2)
    assert len({PiPattern(4, 3, 2), PiPattern(4, 3, 2), PiPattern(4, 3, 2, sinks=1)}) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"window": 0}, ValueError, "window"),
        ({"window": 2.5}, TypeError, "window"),
        ({"window": True}, TypeError, "window"),
        ({"period": 0}, ValueError, "period"),
        ({"period": (4, 0)}, ValueError, r"period\[1\]"),
        ({"period": ()}, ValueError, "period"),
        ({"period": "4"}, TypeError, "period"),
        ({"skips": -1}, ValueError, "skips"),
        ({"sinks": -1}, ValueError, "sinks"),
        ({"causal": 1}, TypeError, "causal"),
        ({"ring": True}, ValueError, "causal=False"),
        ({"sinks": 2, "causal": False}, ValueError, "causal=True"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        PiPattern(**({"window": 4, "period": 4, "skips": 2} | arguments))


def test_ring_needs_periods_that_divide_the_length():
    pattern = PiPattern(4, (4, 5), 2, causal=False, ring=True)
    pattern.check_length(40)
    with pytest.raises(ValueError, match="divide the length"):
        pattern.check_length(42)
    with pytest.raises(ValueError, match="length=S"):
        pattern.sees_local(3, 4)


def test_heads_must_match_the_periods():
    PiPattern(4, 4, 2).check_heads(7)
    with pytest.raises(ValueError, match="2 entries but there are 3"):
        PiPattern(4, (4, 8), 2).check_heads(3)


def test_band_lags():
    assert list(Band(3, -1, 2).lags()) == [-3, 0, 3]
    assert len(Band(3, -1, 2)) == 3
    assert Band(3, 1, None).within(10) == Band(3, 1, 4)
    assert Band(3, 1, 9).mirrored() == Band(3, -8, 0)
    assert BandOfModule is Band
    for method in (Band(3, 1, None).lags, Band(3, 1, None).mirrored):
        with pytest.raises(ValueError, match="within"):
            method()


def test_head_schedules():
    periods = coprime_periods(64, heads=8)
    assert all(math.gcd(a, b) == 1 for i, a in enumerate(periods) for b in periods[:i])
    assert geometric_periods(16, 1024, heads=4) == (16, 64, 256, 1024)
    assert geometric_periods(16, 16, heads=1) == (16,)
    with pytest.raises(ValueError, match="last"):
        geometric_periods(16, 8, heads=2)
