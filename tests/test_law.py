"""The plot of the gain shows made-up rows as they are."""

import pytest

from experiments import language_forms
from report import law
from report.cells import Cell
from report.markdown import NOTHING


def law_cells(scale):
    of_forms = [cell for cell in language_forms.forms(scale) if cell["heads"] == law.HEADS]
    return [*language_forms.law(scale), *of_forms]


def made_up(perplexity, seeds=3, cells=None) -> list[Cell]:
    """Rows of the experiment's cells, whose perplexity is a function of the settings and the seed."""
    return [
        (
            cell,
            [{"settings": {**cell, "seed": seed}, "result": {"test": perplexity(cell, seed)}} for seed in range(seeds)],
        )
        for cell in cells or law_cells("small")
    ]


def perplexity(cell, seed):
    base = 10.0 + seed
    if cell["variant"] == "dense":
        return base * (0.7 if cell["context"] < 16384 else 1.2)
    gain = 0.02 * cell["context"] / cell["keys"] / 10
    return base * (1 - gain) if cell["variant"] == law.FORM else base


def test_points_are_paired_with_window_and_dense_attention():
    found = law.points(made_up(perplexity))
    assert len(found) == 16 + 3
    for point in found:
        assert point.gains == pytest.approx([0.2 * point.context / point.keys] * 3)
        assert point.dense == pytest.approx([30.0 if point.context < 16384 else -20.0] * 3)
        assert point.settled == (point.context < 16384)
    tokens = {point.tokens for point in found if (point.context, point.keys) == (2048, 80)}
    assert tokens == {steps * 32768 for steps in (1000, 2000, 4000, 8000)}


def test_what_has_no_partner_makes_no_point():
    cells = [cell for cell in law_cells("small") if cell["variant"] != law.FORM]
    assert law.points(made_up(perplexity, cells=cells)) == [] and law.law([]) == NOTHING
    cells = [cell for cell in law_cells("small") if cell["variant"] != "dense"]
    assert not any(point.settled or point.dense for point in law.points(made_up(perplexity, cells=cells)))


def test_the_picture_has_a_line_for_each_context_and_hollow_points_where_dense_is_behind():
    left, right = law.picture(law.points(made_up(perplexity))).axes
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["2,048 tokens", "4,096 tokens", "8,192 tokens", "16,384 tokens"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["2,048 tokens, 80 keys"]
    lines = {line.get_label(): line for line in left.get_lines()}
    assert lines["8,192 tokens"].get_xdata().tolist() == [12.8, 25.6, 51.2, 102.4]
    hollow = [bars[0].get_markerfacecolor() for bars in left.containers].count("white")
    assert hollow == 4  # the four numbers of keys at 16,384 tokens
    table = law.law(made_up(perplexity))
    assert "| 16,384 | 80 | 204.8 | 131 M | 41.0 ± 0.0 | -20.0 ± 0.0 | no | 3 |" in table
