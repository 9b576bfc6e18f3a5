import pytest
import torch
from hypothesis import given
from problems import cases

from pi_attention import segments
from pi_attention.masks import dense_mask, dense_masks, flex_mask_mod
from pi_attention.segments import segment_starts, segments_from_cu_seqlens, segments_from_mask, starts_of_last


@given(cases())
def test_flex_mask_mod_agrees_with_the_dense_masks(case):
    ids = case.segment_ids()
    starts = None if ids is None else segment_starts(ids)
    local, skip = dense_masks(case.pattern, case.T, case.S, starts=starts)
    shape = (case.B, case.H, case.T, case.S)
    index = [torch.arange(n).reshape([-1 if d == axis else 1 for d in range(4)]) for axis, n in enumerate(shape)]
    for band, mask in (("local", local), ("skip", skip), ("both", local | skip)):
        seen = flex_mask_mod(case.pattern, case.T, case.S, band=band, starts=starts)(*index)
        assert torch.equal(seen.expand(shape), mask.expand(shape)), band
    assert torch.equal(dense_mask(case.pattern, case.T, case.S, starts=starts), local | skip)


@given(cases())
def test_bands_are_disjoint_and_inside_the_segment(case):
    ids = case.segment_ids()
    starts = None if ids is None else segment_starts(ids)
    local, skip = dense_masks(case.pattern, case.T, case.S, starts=starts)
    assert not (local & skip).any()
    if starts is not None:
        same = starts[:, case.S - case.T :, None] == starts[:, None, :]
        assert not ((local | skip) & ~same[:, None]).any()
        assert not (local | skip).any(dim=1)[starts[:, case.S - case.T :] < 0].any()


def test_segments_from_a_padding_mask():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert segments_from_mask(mask).tolist() == [[-1, -1, 0, 0], [0, 0, 0, -1]]
    assert segments_from_mask(mask).dtype == torch.int32


def test_segments_from_cumulative_lengths():
    assert segments_from_cu_seqlens(torch.tensor([0, 2, 5]), 7).tolist() == [[0, 0, 1, 1, 1, -1, -1]]


def test_starts_tell_runs_apart_even_when_an_id_returns():
    ids = torch.tensor([[0, 0, 1, 0, -1, 0]], dtype=torch.int32)
    assert segment_starts(ids).tolist() == [[0, 0, 2, 3, -1, 5]]


def test_starts_of_the_last_segment():
    ids = torch.tensor([[0, 0, 2, 3, 3, 3], [-1, -1, 2, 2, 2, 2], [0, 0, 0, -1, -1, -1]], dtype=torch.int32)
    wanted = [[-1, -1, -1, 3, 3, 3], [-1, -1, 2, 2, 2, 2], [-1] * 6]
    assert starts_of_last(ids).tolist() == wanted
    assert starts_of_last(ids + 100 * (ids >= 0)).tolist() == wanted  # any numbers do
    starts = starts_of_last(ids)
    assert segment_starts(starts) is starts


def test_segment_starts_come_back_as_they_are_until_somebody_writes_to_them():
    ids = torch.tensor([[4, 4, 4, 7, 7, -1]], dtype=torch.int32)
    starts = segment_starts(ids)
    assert segment_starts(starts) is starts
    with torch.inference_mode():  # where nobody counts what is written
        made = segment_starts(ids)
        made[0, 1:] = 9
        assert segment_starts(made).tolist() == [[0, 1, 1, 1, 1, 1]]
    starts[0, 1:] = 9
    assert segment_starts(starts).tolist() == [[0, 1, 1, 1, 1, 1]]
    assert segment_starts(starts.clone()[:, 2:]).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 64, 65, 100, 511, 512, 513])
def test_a_running_maximum_in_runs_is_that_of_the_row(length, monkeypatch):
    monkeypatch.setattr(segments, "RUN", 4)
    monkeypatch.setattr(segments, "LONG", 8)
    x = torch.randint(1000, (3, length), dtype=torch.int32)
    assert torch.equal(segments.cummax_in_runs(x), x.cummax(dim=1).values)
