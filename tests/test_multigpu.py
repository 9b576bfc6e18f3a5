"""The measurement on several GPUs: dry on gloo, its searches, its rows, its tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.multigpu.rows import OUT_OF_MEMORY, Machine, Rows, read
from benchmarks.multigpu.searches import border, layouts_of, longest, step_of
from benchmarks.multigpu.ways import GATHER, HALO, RING, tokens_of
from pi_attention.distributed import Layout
from report.multigpu import tables

ROOT = Path(__file__).parents[1]


def table(head, body):
    assert all(len(line) == len(head) for line in body)
    return "\n".join("|".join(line) for line in (head, *body))


def dry(out, *options, timeout=500):
    command = [sys.executable, "-m", "benchmarks.multigpu", "--dry", "--out", str(out), "--before", *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read(out)
    assert [row["failed"] for row in rows if "failed" in row] == []
    return rows, done


@pytest.mark.slow
def test_the_operator_dry_on_two_ranks_is_measured_once(tmp_path):
    out = tmp_path / "rows.jsonl"
    asked = ["--pieces", "operator", "--gpus", "1", "2"]
    rows, _ = dry(out, *asked)
    errors = [error for row in rows if row["piece"] == "check" for error in row["largest relative error"].values()]
    assert len(errors) == 4 + 7 and max(errors) < 1e-5
    measured = {(row["ranks"], row["pattern"], row["S"], row["way"]) for row in rows if row["piece"] == "operator"}
    assert len(measured) == 2 * (4 + 7)
    assert all(row["seconds"] > 0 and row["gpu"] == "CPU" and row["torch"] == torch.__version__ for row in rows
               if row["piece"] == "operator")  # fmt: skip
    assert all("without messages s" in row for row in rows if row["ranks"] == 2 and row["piece"] == "operator")
    again, _ = dry(out, *asked)
    assert len(again) == len(rows)  # known already
    assert "Scaling" in tables(table, rows)


@pytest.mark.slow
def test_training_steps_of_all_layouts_dry(tmp_path):
    rows, _ = dry(tmp_path / "rows.jsonl", "--pieces", "layouts", "contexts", "patterns", "largest")
    steps = [row for row in rows if row["piece"] == "step"]
    sizes = [(4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 1)]
    assert {row["layout"] for row in steps} >= {f"dp={dp},tp={tp},cp={cp}" for dp, tp, cp in sizes}
    assert {row["zero"] for row in steps} == {1, 2, 3} and {row["way"] for row in steps} == {HALO, GATHER, RING}
    assert all(row["tokens/s"] > 0 for row in steps)


@pytest.mark.slow
def test_whole_runs_dry(tmp_path):
    rows, _ = dry(tmp_path / "rows.jsonl", "--pieces", "runs", "killed")
    assert [row["agrees"] for row in rows if "resumed from" in row] == [True, True]
    (killed,) = (row for row in rows if row["piece"] == "killed")
    assert killed["exit status"] != 0 and killed["named by torchrun"] and "exitcode" in killed["said"]
    assert "its losses differ" in tables(table, rows)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_eight_processes_dry(tmp_path):
    pieces = ["operator", "layouts", "patterns", "contexts", "runs", "killed"]
    rows, _ = dry(tmp_path / "rows.jsonl", "--gpus", "8", "--minutes", "18", "--pieces", *pieces, timeout=1150)
    assert {row["ranks"] for row in rows} == {8}
    errors = [error for row in rows if row["piece"] == "check" for error in row["largest relative error"].values()]
    assert len(errors) == 7 and max(errors) < 1e-5
    steps = {(row["layout"], row["zero"]) for row in rows if row["piece"] == "step"}
    assert steps >= {(str(Layout.parse(layout)), zero) for layout, zero in layouts_of(8)}
    resumed = [Layout.parse(row["layout"]).ranks for row in rows if row.get("agrees")]
    assert resumed == [4, 2, 1]
    (killed,) = (row for row in rows if row["piece"] == "killed")
    assert killed["exit status"] != 0 and killed["named by torchrun"]


@pytest.mark.parametrize("start", [1, 8, 64])
@pytest.mark.parametrize("room", [0, 1, 8, 50, 64])
def test_a_search_finds_the_largest_that_fits(start, room):
    tried = []
    search = border(start, lambda n: 2 * n, lambda n: n // 2, lambda n: n, least=1, most=64)
    size = next(search)
    while size is not None:
        tried.append(size)
        row = {} if size <= room else {"failed": OUT_OF_MEMORY}
        try:
            size = search.send(row)
        except StopIteration:
            size = None
    assert len(set(tried)) == len(tried)
    fitting = [size for size in tried if size <= room]
    assert max(fitting, default=0) == max((2**n for n in range(7) if 2**n <= room), default=0)
    assert max(fitting, default=0) == 64 or min(size for size in tried if size > room) <= 2 * max(room, 0.5)


def test_a_failure_that_is_no_lack_of_memory_ends_a_search():
    search = longest(80 << 30, 4, HALO, "1b", 1 << 15, 1 << 20)
    next(search)
    with pytest.raises(StopIteration):
        search.send({"failed": "time limit"})


def test_rows_of_another_gpu_and_failures_are_measured_again(tmp_path):
    settings, out = step_of("cp=2", 512, model="toy").batch[0], tmp_path / "rows.jsonl"
    ours, other = Machine("CPU", 4, 1 << 30), Machine("other", 4, 1 << 30)
    rows = Rows(out, [], ours)
    rows.add({**settings, "failed": "time limit"})
    assert rows.of(settings) is None
    rows.add({**settings, "failed": OUT_OF_MEMORY})
    with out.open("a") as file:
        file.write('{"gpu": "CPU", "cut o')  # the call was killed
    assert Rows(out, [], ours).of(settings) is not None and Rows(out, [], other).of(settings) is None


@pytest.mark.parametrize("way", [HALO, GATHER, RING])
def test_the_ranks_hold_every_token_once(way):
    held = torch.cat([tokens_of(way, 64, rank, 4) for rank in range(4)])
    assert held.sort().values.tolist() == list(range(64))


def test_tables_name_the_fewest_gpus_and_what_does_not_fit():
    def step(way, ranks, length, **found):
        case = step_of(f"cp={ranks}", length, way).batch[0]
        return {**case, "piece": "step", "ranks": ranks, "gpu": "G", "torch": "2", "triton": "3", "date": "d"} | found

    figures = {"peak GiB": 10.0, "parameters": 1e9, "seconds": 1.0}
    rows = [step(HALO, ranks, 32768 * ranks, **figures, **{"tokens/s": 100.0 * ranks}) for ranks in (1, 2)]
    rows += [step(HALO, ranks, 65536 * ranks, failed=OUT_OF_MEMORY) for ranks in (1, 2)]
    rows += [step(RING, 2, 32768, **figures, **{"tokens/s": 60.0})]
    text = tables(table, json.loads(json.dumps(rows)))
    assert "halo|32,768|65,536" in text and "65,536|2|–|–" in text
    assert "32,768|halo|100|–|1" in text  # one GPU reaches what the dense ring does with two
    assert "32,768|dense Ring Attention|–|60|≤ 2" in text  # one GPU was not tried
    assert "operator" not in text.split("Training steps")[0]
