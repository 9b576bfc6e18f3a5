"""Differences over documents and by recurrence are paired by seed, and shown as they are."""

import math

import pytest

from experiments.forms import BASELINE
from report.markdown import NOTHING
from report.slices import KINDS, by_recurrence, over_documents, slices


def rows(variant, nats, seeds=(0, 1)):
    """Made-up rows: documents of loss 1, 2, 3 and more with the seed, `nats` above that."""
    made = []
    for seed in seeds:
        documents = [1 + seed + nats, 2 + seed, 3 + seed]
        kinds = {kind: [1 + seed + number * nats, 10 * (number + 1)] for number, kind in enumerate(KINDS)}
        result = {"loss by document": {"test": documents, "validation": documents[:2]}, "by recurrence": kinds}
        made.append(
            {
                "settings": {"variant": variant, "seed": seed},
                "result": result,
                "device": "none",
                "torch": "",
                "date": "",
            }
        )
    return made


def test_documents_are_paired_by_seed():
    base, ours = rows(BASELINE, 0.0), rows("coordinated 4", math.log(1.1), seeds=(1, 7))
    assert over_documents(ours, base) == pytest.approx([10.0, 0.0, 0.0])
    assert over_documents(ours, base, "validation") == pytest.approx([10.0, 0.0])
    assert by_recurrence(ours, base, "beyond") == pytest.approx([3 * math.log(1.1)])


def test_the_table_has_what_was_kept():
    members = [({"variant": v}, rows(v, nats)) for v, nats in ((BASELINE, 0.0), ("dense", -0.1))]
    said = slices([({"context": 9}, members)])
    assert "beyond (57 %), nats" in said and "| dense | -3.2 ± 13.6 |" in said
    assert "| -0.300 ± 0.000 | -0.400 ± 0.000 | 2 |" in said
    older = [({"variant": BASELINE}, [{"settings": {"seed": 0}, "result": {"test": 1.0}}])]
    assert slices([({}, older)]) == slices([]) == NOTHING
