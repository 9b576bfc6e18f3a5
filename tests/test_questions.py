"""What the questions at the end ask for stood where it is said to, and once."""

import pytest
import torch

from experiments.questions import ASK, FEWEST, IGNORE, KEYS, SAY, TASKS, cells, sequences, shortest, within


def read(row, task):
    """Places and meaning of the statements, and the questions, of one sequence."""
    size, said, asked = 1 + task["key"] + task["value"], {}, []
    for place, token in enumerate(row.tolist()):
        run = row[place + 1 : place + size].tolist()
        key, value = tuple(run[: task["key"]]), tuple(run[task["key"] :])
        if token == SAY:
            assert key not in said
            said[key] = (place, said[value][1] if value in said else value)  # a variable is copied after it is said
        elif token == ASK:
            asked.append((place, key, value))
    return said, asked


@pytest.mark.parametrize("name", TASKS)
def test_a_question_asks_for_what_was_said(name):
    task = TASKS[name]
    ids, labels = sequences(16, 512, task, task["asked"], torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (16, 512)
    for row, label in zip(ids, labels, strict=True):
        said, asked = read(row, task)
        assert len(said) == task["statements"] * (1 + task["hops"])
        assert len({key for _, key, _ in asked}) == len(asked) == task["asked"]  # no answer stands in a question before
        places = []
        for place, key, value in asked:
            assert said[key][1] == value and all(KEYS <= token < SAY for token in value)
            places += range(place + 1 + task["key"], place + 1 + task["key"] + task["value"])
        assert (label != IGNORE).nonzero().flatten().tolist() == places
        assert torch.equal(label[places], row[places])


@pytest.mark.parametrize("name", ["16 pairs", "16 needles", "one needle"])
def test_the_statement_stands_at_its_depth(name):
    task = TASKS[name]
    for depth, share in ((0.0, 0), (0.5, 0.5), (1.0, 1)):
        ids, _ = sequences(8, 1024, task, 1, torch.Generator().manual_seed(0), depth)
        for row in ids:
            said, ((_, key, _),) = read(row, task)
            assert said[key][0] == pytest.approx(share * 1024, abs=16)


def test_statements_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="64 statements of 3 tokens and 16 questions do not fit into length=128"):
        sequences(1, 128, TASKS["64 pairs"], 16, torch.Generator())


def test_short_texts_have_fewer_statements():
    for task in TASKS.values():
        assert within(task, 2048) == task
        fewest, whole = within(task, 1), shortest(task)
        assert fewest["statements"] * (1 + fewest["hops"]) <= FEWEST
        assert within(task, whole // 2) != task or task["statements"] == 1
        for length in (2**power for power in range(5, 12)):
            fitted = within(task, length)
            assert fitted["asked"] <= fitted["statements"] <= task["statements"]
            if length >= shortest(fewest):
                sequences(2, length, fitted, fitted["asked"], torch.Generator())  # fits


def test_cells_begin_with_the_shortest_text_and_end_at_their_context():
    for cell in cells("small"):
        assert cell["shorter first"][0] == shortest(within(cell, 1)) <= 64
        assert cell["shorter first"] == sorted(cell["shorter first"])
        assert cell["shorter first"][-1] * 2 == cell["context"]
