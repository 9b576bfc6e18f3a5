"""A sequence over several processes equals one process: outputs, gradients, training."""

from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing
from distributed_worker import work
from hypothesis import given, settings
from hypothesis import strategies as st

from pi_attention import PiPattern
from pi_attention.distributed import halo_plan


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_sharded_equals_whole(ranks, tmp_path):
    seeds = range(12 * ranks, 12 * ranks + 12)
    try:
        multiprocessing.spawn(work, args=(ranks, str(tmp_path), seeds), nprocs=ranks)
    except Exception:
        errors = sorted(Path(tmp_path).glob("error-*"))
        pytest.fail("\n".join(f"{file.name}: {file.read_text()}" for file in errors) or "a process died")


@st.composite
def shardings(draw):
    lengths = draw(st.lists(st.integers(0, 15), min_size=1, max_size=6).filter(sum))
    starts = draw(st.sets(st.integers(1, max(1, sum(lengths) - 1)), max_size=3))
    documents = [0, *sorted(s for s in starts if s < sum(lengths))]
    causal = draw(st.booleans())
    periods = draw(st.lists(st.integers(1, 15), min_size=1, max_size=2))
    pattern = PiPattern(
        draw(st.integers(1, 9)),
        tuple(periods) if len(periods) > 1 else periods[0],
        draw(st.sampled_from([0, 1, 3, None])),
        causal=causal,
        sinks=draw(st.integers(0, 3)) if causal else 0,
    )
    return pattern, lengths, documents


@settings(max_examples=300, deadline=None)
@given(shardings())
def test_a_rank_needs_exactly_the_keys_that_its_queries_see(case):
    pattern, lengths, documents = case
    plan = halo_plan(pattern, lengths, documents)
    ends = [*documents[1:], sum(lengths)]
    for halo in plan.halos:
        seen = set()
        for query in range(*halo.own):
            start, end = next((a, b) for a, b in zip(documents, ends, strict=True) if a <= query < b)
            for head in range(len(pattern.periods)):
                local, skip = pattern.keys(query - start, end - start, head=head)
                seen |= {start + key for key in local + skip}
        needed = {position for a, b in halo.needed for position in range(a, b)}
        assert needed == seen - set(range(*halo.own))
        places = [halo.place(position) for position in sorted(needed | set(range(*halo.own)))]
        assert places == sorted(set(places)) and all(0 <= place < halo.length for place in places)


def test_the_halo_is_bounded_by_the_reach_and_smaller_for_short_shards():
    pattern = PiPattern(1024, 4096, 4)
    wide = halo_plan(pattern, [65536] * 16).halos[8]
    assert wide.rows == pattern.reach == 16384
    short = halo_plan(pattern, [1024] * 1024).halos[512]
    assert short.rows == 4 * 1024 + 1023
    assert halo_plan(pattern, [1024] * 1024).rows(512, 511) == 1023


def test_contiguous_shards_are_balanced():
    pattern, ranks, total = PiPattern(1024, 4096, 4), 64, 1 << 20
    lags = [lag for band in (pattern.local_band, pattern.skip_band()) for lag in band.lags()]
    work_of = []
    for rank in range(ranks):
        start = rank * total // ranks
        visits = 0
        for lag in lags:
            visits += max(0, min(total // ranks, start + total // ranks - lag))
        work_of.append(visits)
    assert max(work_of) / (sum(work_of) / ranks) <= 1.01


def test_wrong_plans_are_named():
    with pytest.raises(ValueError, match="ring=True"):
        halo_plan(PiPattern(2, 2, 1, causal=False, ring=True), [4, 4])
    with pytest.raises(ValueError, match=r"documents=\[0, 9\]"):
        halo_plan(PiPattern(2, 2, 1), [4, 4], [0, 9])
    with pytest.raises(ValueError, match="must not be negative"):
        halo_plan(PiPattern(2, 2, 1), [4, -4])
