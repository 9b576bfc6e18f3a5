import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import patterns

from pi_attention import Band, PiPattern, coordinated_heads, coprime_periods, dilated_heads, geometric_periods
from pi_attention.pattern import Band as BandOfModule


def keys_by_definition(p: PiPattern, query: int, length: int, head: int) -> tuple[set[int], set[int]]:
    """The two sets, from the sentence of the design and nothing else."""
    period, phase = p.period_of(head), p.phase_of(head)
    first = math.ceil((p.window - phase) / period)
    count = length if p.skips is None else p.skips
    lags = {c * period + phase for c in range(first, first + count)}
    signs = [1] if p.causal else [1, -1]
    if p.ring:
        local = {(query - lag) % length for lag in range(1 - p.window, p.window)}
        shorter = {lag for lag in lags if 2 * lag <= length}  # a key has one distance, the shorter way round
        skip = {(query - sign * lag) % length for lag in shorter for sign in signs} - local
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
        pattern = replace(pattern, sinks=0)
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
        ({"phase": -1}, ValueError, "phase"),
        ({"phase": 4}, ValueError, "phase=4 .*period of its head, 4"),
        ({"phase": (0, 4)}, ValueError, r"phase\[1\]=4"),
        ({"phase": (0, 1.5)}, TypeError, r"phase\[1\]"),
        ({"phase": ()}, ValueError, "phase"),
        ({"phase": (0, 1, 2), "period": (4, 4)}, ValueError, "phase has 3 entries and period has 2"),
        ({"phase": 3, "period": (4, 3)}, ValueError, "period of its head, 3"),
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
    with pytest.raises(ValueError, match="phase has 2 entries but there are 3"):
        PiPattern(4, 4, 2, phase=(0, 1)).check_heads(3)


def test_band_lags():
    assert list(Band(3, -1, 2).lags()) == [-3, 0, 3]
    assert len(Band(3, -1, 2)) == 3
    assert Band(3, 1, None).within(10) == Band(3, 1, 4)
    assert Band(3, 1, 9).mirrored() == Band(3, -8, 0)
    assert BandOfModule is Band
    for method in (Band(3, 1, None).lags, Band(3, 1, None).mirrored):
        with pytest.raises(ValueError, match="within"):
            method()


@given(st.data())
def test_a_pattern_survives_json_and_integers(data):
    pattern = data.draw(patterns(heads=3, length=24))
    assert PiPattern.from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern
    again = PiPattern.from_ints(pattern.to_ints())
    assert (again.skip_bands(), again.local_band) == (pattern.skip_bands(), pattern.local_band)
    assert (again.skips, again.causal, again.ring, again.sinks) == (
        *(pattern.skips, pattern.causal, pattern.ring, pattern.sinks),
    )


def test_a_dict_of_an_older_version_has_no_phase_and_unknown_fields_are_named():
    assert PiPattern.from_dict({"window": 4, "period": [4, 5], "skips": 2, "sinks": 1}) == PiPattern(
        4, (4, 5), 2, sinks=1
    )
    with pytest.raises(ValueError, match="'stride' is no field"):
        PiPattern.from_dict({"window": 4, "period": 4, "skips": 2, "stride": 3})
    with pytest.raises(ValueError, match="no 'skips'"):
        PiPattern.from_dict({"window": 4, "period": 4})


@given(window=st.integers(1, 40), period=st.integers(1, 9), skips=st.integers(1, 12))
def test_heads_with_all_phases_share_a_window_of_their_lags(window, period, skips):
    """Every lag of [0, w + m·p) is seen by some head, and each lag beyond the window by exactly one."""
    pattern = coordinated_heads(window, skips, heads=period, period=period)
    lags = sorted(lag for head in range(period) for lag in pattern.skip_band(head).lags())
    assert lags == list(range(window, window + skips * period))
    assert pattern.reach == window + skips * period - 1


def test_heads_of_a_rank_keep_their_periods_and_phases():
    pattern = coordinated_heads(8, 4, heads=8, period=(4, 16))
    assert (pattern.periods, pattern.phases) == ((4,) * 4 + (16,) * 4, (0, 1, 2, 3, 0, 4, 8, 12))
    for first in range(0, 8, 2):
        part = pattern.of_heads(first, first + 2)
        assert [part.skip_band(head) for head in range(2)] == [pattern.skip_band(first + head) for head in range(2)]
    assert PiPattern(8, 4, 2, phase=3).of_heads(0, 1) == PiPattern(8, 4, 2, phase=3)


@pytest.mark.parametrize(("heads", "phases"), [(4, 4), (8, 4), (6, 3), (9, 3), (7, 7), (2, 2), (1, 1)])
def test_phases_divide_the_heads_by_default_and_leave_no_hole(heads, phases):
    pattern = coordinated_heads(16, 8, heads)
    assert set(pattern.phases) == set(range(phases)) and set(pattern.periods) == {phases}


def test_constructors_name_what_is_wrong():
    with pytest.raises(ValueError, match="must divide heads=4"):
        coordinated_heads(16, 8, 4, period=(4, 8, 16))
    with pytest.raises(ValueError, match="heads"):
        coordinated_heads(16, 8, 0)
    with pytest.raises(ValueError, match="period"):
        coordinated_heads(16, 8, 4, period=0)
    with pytest.raises(TypeError, match="period must be an int or several ints"):
        coordinated_heads(16, 8, 4, period=2.0)
    with pytest.raises(ValueError, match="context"):
        dilated_heads(16, 8, 4, context=0)
    with pytest.raises(TypeError, match="must be a dict of its fields, got None"):
        PiPattern.from_dict(None)
    with pytest.raises(ValueError, match="heads 1 to 5 are not among the 3"):
        PiPattern(2, 4, 2, phase=(0, 1, 2)).of_heads(1, 5)


def test_head_schedules():
    periods = coprime_periods(64, heads=8)
    assert all(math.gcd(a, b) == 1 for i, a in enumerate(periods) for b in periods[:i])
    assert geometric_periods(16, 1024, heads=4) == (16, 64, 256, 1024)
    assert geometric_periods(16, 16, heads=1) == (16,)
    with pytest.raises(ValueError, match="last"):
        geometric_periods(16, 8, heads=2)
