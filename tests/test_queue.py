"""Rows are measured in the order of importance, once each, in time; and one that fails stops no other."""

import math
import os
import time
from multiprocessing import get_context

import pytest
import torch

from experiments import runner
from experiments.experiment import Experiment, best_rate
from experiments.rows import append, claim, load
from experiments.schedule import MARGIN, expected
from experiments.workers import measured


def toy(measure, cells=({"a": 1}, {"a": 2}), rates=(0.1, 0.2), name="toy", **more):
    return Experiment(name, "", "", "lower", lambda scale: list(cells), measure, rates, **more)


def run(experiments, folder, **more):
    return runner.run(experiments, "smoke", folder, folder=folder, **more)


def test_a_run_tunes_the_rate_and_skips_finished_rows(tmp_path):
    asked = []

    def measure(settings, folder):
        asked.append((settings["a"], settings["rate"], settings["seed"]))
        return {"validation": abs(settings["rate"] - settings["a"] / 10), "test": settings["seed"] / 10}

    run([toy(measure)], tmp_path, seeds=2)
    assert asked == [(1, 0.1, 0), (1, 0.2, 0), (1, 0.1, 1), (2, 0.1, 0), (2, 0.2, 0), (2, 0.2, 1)]
    done = run([toy(measure)], tmp_path)["toy"]
    assert asked[6:] == [(1, 0.1, 2), (2, 0.2, 2)]
    assert done == load("toy", tmp_path) and len(done) == 8
    with pytest.raises(ValueError, match="leaves no cell of toy"):
        run([toy(measure)], tmp_path, only="nothing")


def test_a_row_that_fails_is_named_and_stops_no_other(tmp_path, capsys):
    def measure(settings, folder):
        if settings["a"] == 1 and settings["rate"] == 0.1:
            raise RuntimeError("cut off")
        if settings["a"] == 2:
            raise ValueError("never")
        return {"validation": 0.0, "test": 0.0}

    with pytest.raises(runner.RowsFailed, match="3 rows failed"):
        run([toy(measure)], tmp_path, seeds=2)
    rows = [(row["settings"]["rate"], row["settings"]["seed"]) for row in load("toy", tmp_path)]
    assert rows == [(0.2, 0), (0.2, 1)]  # the best of the rates that ran; no further seed where none did
    said = capsys.readouterr()
    assert "{'a': 1, 'rate': 0.1, 'seed': 0} failed: RuntimeError('cut off')" in said.err
    assert "1 rows are left" in said.out


def test_experiments_come_in_the_order_of_importance(tmp_path):
    asked = []

    def measure(settings, folder):
        asked.append((settings["of"], settings["seed"]))
        return {"validation": 0.0, "test": 0.0}

    first, second, third = (
        toy(measure, [{"of": f"{name}{number}"} for number in range(cells)], (0.1,), name, seeds=seeds)
        for name, cells, seeds in (("a", 1, 2), ("b", 2, 2), ("c", 3, 1))
    )
    run([second, first], tmp_path)
    assert asked == [("b0", 0), ("b0", 1), ("b1", 0), ("b1", 1), ("a0", 0), ("a0", 1)]
    asked.clear()
    run([first, second, third], tmp_path / "in turn", in_turn=True)
    assert asked == [("a0", 0), ("a0", 1), ("b0", 0), ("b0", 1), ("c0", 0), ("b1", 0), ("b1", 1), ("c1", 0), ("c2", 0)]


def test_no_row_begins_that_would_end_after_the_deadline(tmp_path):
    asked = []

    def measure(settings, folder):
        asked.append(settings["steps"])
        return {"validation": 0.0, "test": 0.0}

    cells = [{"steps": steps} for steps in (500, 100, 400, 300)]
    experiment = toy(measure, cells, (0.1,), seeds=1, seconds=lambda settings: float(settings["steps"]))
    for settings, seconds in (({"steps": 100, "rate": 0.1, "seed": 7}, 290.0), ({"steps": 400}, 90.0)):
        append("toy", {"settings": settings, "result": {}, "seconds": seconds}, tmp_path)
    run([experiment], tmp_path, minutes=5)  # 100 steps took 290 s, so a tenth more is too long
    assert asked == [400]
    run([experiment], tmp_path, minutes=5.1)
    assert asked == [400, 300]
    run([experiment], tmp_path)
    assert asked == [400, 300, 500, 100]


def test_a_row_is_expected_to_take_as_long_as_the_latest_of_its_size():
    experiment = toy(None, seconds=lambda settings: 7.0)

    def rows(*entries):
        return [{"settings": {"variant": v, "steps": n, "rate": 1, "seed": 0}, "seconds": s} for v, n, s in entries]

    asked = {"variant": "dense", "steps": 10, "rate": 2, "seed": 5}
    assert expected(experiment, asked, []) == 7.0
    assert expected(experiment, asked, rows(("pi", 20, 99.0))) == 7.0  # of another size
    others = rows(("pi", 10, 30.0), ("ring", 10, 20.0))
    assert expected(experiment, asked, others) == MARGIN * 30
    known = rows(("dense", 10, 90.0), *[("dense", 10, 50.0), ("dense", 10, 40.0)] * 2)
    assert expected(experiment, asked, others + known) == MARGIN * 50  # of the variant itself, of late


def hold(folder, settings, ready, done):
    with claim("toy", settings, folder) as free:
        assert free
        ready.set()
        done.wait(60)


def test_a_row_that_another_process_measures_is_left_to_it(tmp_path):
    context = get_context("spawn")
    ready, done = context.Event(), context.Event()
    mine = {"a": 1, "rate": 0.1, "seed": 0}
    other = context.Process(target=hold, args=(tmp_path, mine, ready, done))
    other.start()
    assert ready.wait(60)
    row = {"validation": 0.0, "test": 0.0}
    assert measured("toy", lambda settings, data: row, mine, tmp_path, tmp_path) is None
    rows = run([toy(lambda settings, data: row, rates=(0.1,))], tmp_path, seeds=1)["toy"]
    assert [found["settings"]["a"] for found in rows] == [2]
    done.set()
    other.join()
    assert measured("toy", lambda settings, data: row, mine, tmp_path, tmp_path)["settings"] == mine
    assert measured("toy", None, mine, tmp_path, tmp_path)["settings"] == mine  # finished since: not measured again


def seen_gpu(settings, data):
    mine = os.environ["CUDA_VISIBLE_DEVICES"]
    (data / f"gpu {mine}").touch()
    until = time.monotonic() + 60
    while len(list(data.glob("gpu *"))) < 2 and time.monotonic() < until:  # so that no worker takes all rows
        time.sleep(0.05)
    if settings["a"] == 2 and settings["rate"] == 0.1:
        os._exit(1)  # as a crash does
    return {"validation": 0.0, "test": int(mine)}


def test_workers_take_the_visible_gpus_in_turn_and_are_replaced_when_they_die(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(runner.RowsFailed, match="1 rows failed"):
        run([toy(seen_gpu)], tmp_path, workers=2, seeds=2)
    rows = load("toy", tmp_path)
    assert {row["result"]["test"] for row in rows} == {3, 5}
    assert sorted((row["settings"]["a"], row["settings"]["seed"]) for row in rows) == [
        (1, 0),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_a_rate_that_diverges_is_not_the_best():
    rows = [{"settings": {"rate": r, "seed": 0}, "result": {"validation": v}} for r, v in ((1, math.nan), (2, 7.0))]
    assert best_rate(toy(None), {}, rows) == 2
