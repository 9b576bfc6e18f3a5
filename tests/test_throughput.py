"""The benchmark of continuous batching at toy size: every cell is checked, measured once, and shown."""

import json

import pytest
import torch
from served_models import known

import benchmarks.throughput as benchmark
from pi_attention.serving.memory import request_bytes

CELLS = ["--toy", "--requests", "1", "3", "--prompts", "20", "--new", "4", "--repeats", "1"]
TOY = ("toy", 26, torch.float32, "cpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A result file of two cells."""
    path = tmp_path_factory.mktemp("results") / "throughput-toy.json"
    benchmark.main(["--out", str(path), *CELLS])
    return path


@pytest.fixture
def cells(monkeypatch):
    """The cells that are measured from here on."""
    asked, usual = [], benchmark.cell

    def counted(options, shape, requests, tokens, deadline):
        asked.append((shape, requests, tokens))
        return usual(options, shape, requests, tokens, deadline)

    monkeypatch.setattr(benchmark, "cell", counted)
    return asked


@known
def test_each_cell_is_checked_and_has_the_bytes_of_both_models(measured):
    rows = json.loads(measured.read_text())["rows"]
    assert [(row["requests"], row["prompt"]) for row in rows] == [(1, 20), (3, 20)]
    for row in rows:
        assert row["float32 texts"] == {"compared": row["requests"], "equal": row["requests"], "ties": 0}
        dense, ours = row["original"], row["converted"]
        assert ours["bytes held"] == row["requests"] * request_bytes(benchmark.converted(*TOY), 23)
        assert dense["bytes held"] == row["requests"] * 256 * 2 * 2 * 2 * 8 * 4  # page, layers, k and v, G, D, fp32
        for kind in (dense, ours):
            assert kind["at once"] == row["requests"] and kind["bytes allocated"] >= kind["bytes held"]
            assert 0 < kind["first token s"] <= kind["last first token s"] < kind["seconds"]
            assert kind["new tokens/s"] == pytest.approx(4 * row["requests"] / kind["seconds"])


@known
def test_a_later_run_measures_what_is_missing(measured, tmp_path, cells):
    result = json.loads(measured.read_text())
    (path := tmp_path / "half.json").write_text(json.dumps(result | {"rows": result["rows"][:1]}))
    benchmark.main(["--out", str(path), *CELLS])
    assert cells == [("toy", 3, 20)]
    rows = json.loads(path.read_text())["rows"]
    assert rows[0] == result["rows"][0] and rows[1]["requests"] == 3


@known
def test_rows_of_other_settings_are_kept_apart(measured):
    before = measured.read_text()
    with pytest.raises(SystemExit, match=r"its new tokens is 4, here 5: name another file"):
        benchmark.main(["--out", str(measured), *CELLS, "--new", "5"])
    assert measured.read_text() == before


@known
def test_a_spent_budget_ends_without_a_row(tmp_path, capsys):
    benchmark.main(["--out", str(tmp_path / "none.json"), *CELLS, "--minutes", "0"])
    assert "toy, 1 × 20 is not measured" in capsys.readouterr().out
    assert not (tmp_path / "none.json").exists()


@known
def test_a_model_that_cannot_be_served_is_named_in_its_row(tmp_path, monkeypatch):
    from benchmarks import managed

    usual = managed.settings_of

    def few(model, *sizes):
        settings = usual(model, *sizes)
        if not hasattr(model.config, "patterns"):
            settings.page_size = 4  # of which 20 tokens need more than there are
        return settings

    monkeypatch.setattr(managed, "settings_of", few)
    benchmark.main(["--out", str(tmp_path / "few.json"), *CELLS, "--requests", "1"])
    (row,) = json.loads((tmp_path / "few.json").read_text())["rows"]
    assert "No requests can be scheduled" in row["original"]["failed"]
    assert row["converted"]["new tokens/s"] > 0


@known
def test_a_model_that_takes_too_long_is_given_up(tmp_path):
    path = tmp_path / "slow.json"
    benchmark.main(["--out", str(path), *CELLS, "--requests", "1", "--run-minutes", "0"])
    (row,) = json.loads(path.read_text())["rows"]
    assert row["float32 texts"]["equal"] == 1
    assert row["original"] == row["converted"] == {"failed": "more than 0 minutes"}


@known
def test_a_wrong_text_ends_the_run(tmp_path, monkeypatch):
    from benchmarks import managed

    model, prompts = benchmark.converted(*TOY), benchmark.prompts_of("toy", 2, 20)
    texts = managed.serve(model, prompts, 4, 64, float("inf")).texts
    assert managed.compare(model, prompts, texts)["equal"] == 2
    with pytest.raises(managed.Failed, match="request 0 differs from generate at new token"):
        managed.compare(model, prompts, texts[::-1])

    def wrong(*arguments):
        raise managed.Failed("request 0 differs")

    monkeypatch.setattr(managed, "compare", wrong)
    with pytest.raises(SystemExit, match=r"toy, 1 × 20: request 0 differs; no row is written"):
        benchmark.main(["--out", str(tmp_path / "wrong.json"), *CELLS])


def test_what_it_needs_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("pi_attention.models.continuous.INSTALLED", "5.17.0")
    with pytest.raises(SystemExit, match=r"needs transformers 5\.23 .* CUDA GPU with triton; here") as refused:
        benchmark.main(["--out", str(tmp_path / "x.json"), "--toy"])
    assert "\n" not in str(refused.value)


@known
def test_the_table_shows_both_models_and_a_failure(measured, tmp_path, monkeypatch):
    from report import markdown, serving

    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert serving.throughput() == markdown.NOTHING
    result = json.loads(measured.read_text())
    result["rows"][1]["original"] = {"failed": "out of memory"}
    (tmp_path / "throughput-toy.json").write_text(json.dumps(result))
    first, second = serving.throughput().splitlines()[-2:]
    assert f"| {result['rows'][0]['original']['new tokens/s']:,.0f} |" in first and first.endswith("| 1 of 1 |")
    assert second.startswith("| toy | 20 | 3 | out of memory | ") and second.endswith("| – | 3 | 3 of 3 |")
