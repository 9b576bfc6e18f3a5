"""The speed of a converted model, on a toy: every variant is timed in each way, and the table stands beside dense."""

import json

import pytest

from benchmarks import converted, timing
from report import markdown, pretrained


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    return tmp_path


def test_a_converted_model_is_timed_beside_its_dense_original(results, monkeypatch):
    asked = ["converted", "--shape", "toy", "--contexts", "12", "--new", "4"]
    monkeypatch.setattr("sys.argv", asked)
    assert pretrained.speed() == markdown.NOTHING
    converted.main()
    (path,) = results.glob("speed-toy-*.json")
    rows = json.loads(path.read_text())["speed"]
    assert [row["variant"] for row in rows] == [*converted.VARIANTS]
    timed = [name for name in pretrained.TIMES if name != "static, decode s"]  # a difference, of few tokens here
    assert all(row[name] > 0 for row in rows for name in timed)
    dense, *others = [line for line in pretrained.speed().splitlines() if line.startswith("| 12 |")]
    assert dense.count("1.00×") >= len(timed) and len(others) == len(converted.PATTERNS)
