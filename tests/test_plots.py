"""The pictures of patterns: their cells and rows against the keys that the pattern names one by one."""

import pytest
import torch
from hypothesis import given, settings
from matplotlib.colors import to_rgb
from problems import cases

from pi_attention import PiPattern, plots
from pi_attention.heads import coordinated_heads, dilated_heads
from pi_attention.masks import dense_masks
from pi_attention.plots.pattern import heads_alike, seen_by
from pi_attention.receptive_field import receptive_field


@settings(max_examples=60, deadline=None)
@given(case=cases())
@pytest.mark.parametrize("cell", [1, 3])
def test_cells_of_the_picture_are_those_of_the_masks(case, cell):
    pattern = case.pattern
    unsunk = PiPattern(**pattern.to_dict() | {"sinks": 0})
    cells = case.S // cell
    length = cells * cell
    if length == 0 or (pattern.ring and length != case.S):
        return
    seen = seen_by(unsunk, length, cell)
    local, skip = dense_masks(unsunk, length, length)
    heads = [alike[0] for alike in heads_alike(unsunk).values()]
    masks = torch.cat([local[0], skip[0, heads]])
    blocks = masks.reshape(-1, cells, cell, cells, cell).any(4).any(2)
    diagonal = torch.arange(cells)[:, None] - torch.arange(cells)
    # A block on the edge of a ring or a line holds the lags of its diagonal, but not every one of them in every block.
    drawn = seen[:, diagonal + cells - 1]
    assert torch.equal(drawn, blocks)


def colours_of(axis, image=0):
    """The RGB values of an image of an axis, as hexadecimal words."""
    return torch.tensor(axis.images[image].get_array()[..., :3]).mul(255).round().int()


def rgb(colour):
    return torch.tensor(to_rgb(colour)).mul(255).round().int()


def test_the_picture_shows_window_skips_of_each_head_and_sinks():
    pattern, length = coordinated_heads(window=6, skips=6, heads=4, sinks=2), 38
    figure = plots.pattern_picture(pattern, length)
    mask, lags = figure.axes
    picture = colours_of(mask)
    for query in range(length):
        for key in range(length):
            lag = query - key
            want = plots.PAPER
            if 0 <= lag < 6:
                want = plots.LOCAL
            elif lag >= 0 and key < 2:
                want = plots.SINKS
            elif 6 <= lag < 30:
                want = plots.HEADS[lag % 4]
            assert torch.equal(picture[query, key], rgb(want)), (query, key)
    labels = [text.get_text() for text in lags.get_yticklabels()]
    assert labels == [*(f"head {head}: phase {head}" for head in range(4)), "together"]
    together = colours_of(lags, 4)[0, :30]
    want = [plots.LOCAL if lag < 6 else plots.HEADS[lag % 4] for lag in range(30)]
    assert torch.equal(together, torch.stack([rgb(colour) for colour in want]))
    assert lags.get_title() == "together they see every lag from 0 to 29"
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[0] == "window: the last 6 keys" and words[-1] == "sinks: the first 2 keys"
    assert words[1:5] == [f"6 skips of head {head}" for head in range(4)]


@pytest.mark.parametrize(
    "pattern",
    [
        PiPattern(20, 1, 0),
        PiPattern(64, 64, 16),
        PiPattern(5, (7, 11), 3, causal=False),
        PiPattern(3, (8, 12), 2, causal=False, ring=True),
        PiPattern(16, tuple(range(20, 60)), 4, sinks=3),
        coordinated_heads(16, None, 4),
        dilated_heads(16, 64, 4, context=1 << 17),
    ],
    ids=str,
)
def test_every_kind_of_pattern_has_its_pictures(pattern, tmp_path):
    length = 48 if pattern.ring else plots.telling_length(pattern, 1 << 17)
    plots.save(plots.pattern_picture(pattern, length), tmp_path / "pattern.png")
    plots.save(plots.density_picture({"one": pattern}, length), tmp_path / "density.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("pattern.png", "density.png"))


def test_no_line_is_left_out_for_want_of_a_colour():
    names = [str(number) for number in range(11)]
    drawn = plots.curves({name: [(1, 1), (2, 2)] for name in names}, "x", "y").axes[0]
    assert drawn.get_legend_handles_labels()[1] == names
    drawn = plots.intervals({"row": dict.fromkeys(names, (1.0, 0.5))}, "x").axes[0]
    assert drawn.get_legend_handles_labels()[1] == names
    field = receptive_field([PiPattern(4, 4, 2)], 64)
    assert len(plots.hops_picture(dict.fromkeys(names, field)).axes[0].lines) == len(names)


def test_the_density_picture_holds_the_octaves():
    figure = plots.density_picture({"coordinated": coordinated_heads(16, 64, 4)}, 2048)
    (steps,) = figure.axes[0].patches
    values, edges, _ = steps.get_data()
    assert list(edges) == [1, 16, 32, 64, 128, 256, 512, 1024, 2048]
    assert [*values[:6]] == pytest.approx([1, 0.25, 0.25, 0.25, 0.25, 0.25 * 16 / 256])


def test_the_pictures_of_a_hybrid_show_its_windows_and_name_its_other_layers():
    window, dense = PiPattern(8, 1, 0), PiPattern(2**40, 1, 0)
    figures = [plots.stack_picture(stack, 64) for stack in ([window, window, dense], [window] * 2)]
    titles = [figure.axes[0].get_title() for figure in figures]
    assert titles == ["layers 0, 1 of 3, all heads", "one layer, all heads"]
    assert [figure.get_supxlabel() for figure in figures] == ["layer 2: every token up to itself", ""]
    assert plots.density_picture({"window": window, "dense": dense}, 64).axes[0].get_ylim()[1] < 10
