"""What the measurement on several GPUs would do on machines that are not here: its cases, searches and tables."""

from collections import Counter

import pytest

pytest.importorskip("transformers")

from benchmarks.multigpu.operator import DENSE, ways_of
from benchmarks.multigpu.pieces import PIECES, options, planned
from benchmarks.multigpu.rows import OUT_OF_MEMORY, Machine, Rows
from benchmarks.multigpu.runs import resumed_of, whole_of
from benchmarks.multigpu.searches import step_of
from benchmarks.multigpu.step import predicted
from benchmarks.multigpu.ways import GATHER, HALO, RING
from pi_attention import PiPattern
from pi_attention.bill import MODELS, fewest_ranks
from pi_attention.distributed import Layout
from report.multigpu import tables
from report.multigpu_rows import latest

FULL = 141 << 30
PATTERN = PiPattern(256, 256, 16)
ABOUT = {"gpu": "made up", "torch": "2", "triton": "3", "date": "2026"}


def answers(case):
    """The rows of a case on GPUs whose time is their tokens and whose memory is as the bill says."""
    for settings in case.batch:
        about = ABOUT | {"piece": case.piece, "ranks": case.ranks}
        if case.piece == "operator":
            yield about | {"piece": "check", "pattern": settings["pattern"], "largest relative error": {HALO: 1e-3}}
            for length in settings["lengths"]:
                for way in ways_of(settings["pattern"], case.ranks):
                    figures = {"seconds": length / case.ranks, "peak GiB": 1.0, "halo rows": 1}
                    yield about | {"pattern": settings["pattern"], "S": length, "way": way} | figures
        elif case.piece == "step":
            bytes_ = predicted(settings)
            if bytes_ > FULL:
                yield about | settings | {"failed": OUT_OF_MEMORY}
                continue
            layout = Layout.parse(settings["layout"])
            tokens = layout.dp * settings["S"]
            figures = {"parameters": 1e9, "peak GiB": bytes_ / 2**30}
            if not settings["hollow"]:
                figures |= {"seconds": tokens / case.ranks, "tokens/s": float(case.ranks)}
            yield about | settings | figures
        elif case.piece == "run":
            whole = str(whole_of(case.ranks))
            for layout in resumed_of(case.ranks):
                row = {"layout": str(layout), "resumed from": whole, "at": 2, "largest difference": 0.0}
                yield about | settings | row
        else:
            said = {"named by a rank": True, "named by torchrun": False, "others ended after s": 9.0}
            yield about | settings | said


def played(folder, gpus, *arguments):
    """The cases that come on so many GPUs, and their rows."""
    machine = Machine("made up", gpus, FULL)
    given = options(arguments=["--before", *arguments])
    cases, rows = [], []
    for search in planned(given, Rows(folder / "rows.jsonl", [], machine)):
        row = None
        while True:
            try:
                case = search.send(row)
            except StopIteration:
                break
            cases.append(case)
            rows += (found := list(answers(case)))
            row = found[-1]
    return cases, rows


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_every_piece_uses_all_gpus_and_no_more(gpus, tmp_path):
    for piece in PIECES:
        cases, _ = played(tmp_path, gpus, "--pieces", piece)
        used = {case.ranks for case in cases}
        if piece in ("runs", "killed", "stopped"):
            assert used == ({gpus} if gpus > 1 else set())
        else:
            assert max(used) == gpus and all(gpus % ranks == 0 for ranks in used)
        for case in cases:
            if case.piece == "step":
                assert {Layout.parse(settings["layout"]).ranks for settings in case.batch} == {case.ranks}
            settings = [str(each) for each in case.batch]
            assert max(Counter(settings).values()) == 1


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_layouts_share_in_every_way(gpus, tmp_path):
    cases, _ = played(tmp_path, gpus, "--pieces", "layouts", "--gpus", str(gpus))
    steps = [settings for case in cases for settings in case.batch]
    kinds = {tuple(size > 1 for size in (layout.dp, layout.tp, layout.cp))
             for layout in (Layout.parse(step["layout"]) for step in steps)}  # fmt: skip
    alone = {(True, False, False), (False, True, False), (False, False, True)}
    pairs = {(True, False, True), (False, True, True), (True, True, False)}
    assert kinds == alone | (pairs if gpus >= 4 else set()) | ({(True, True, True)} if gpus >= 8 else set())
    assert {step["zero"] for step in steps} == ({3} if gpus == 2 else {1, 2, 3})
    assert {step["loss slice"] for step in steps} == {4096, None}


@pytest.mark.parametrize(("gpus", "longest"), [(4, 1 << 21), (8, 1 << 22)])
def test_the_operator_is_measured_up_to_half_a_million_tokens_a_gpu(gpus, longest, tmp_path):
    _, rows = played(tmp_path, gpus, "--pieces", "operator", "--gpus", "1", str(gpus))
    lengths = {ranks: [row["S"] for row in rows if row.get("way") == HALO and row["ranks"] == ranks]
               for ranks in (1, gpus)}  # fmt: skip
    assert (min(lengths[gpus]), max(lengths[gpus]), max(lengths[1])) == (1 << 15, longest, 1 << 20)
    assert {row["pattern"] for row in rows} >= {"coordinated heads", "sinks", DENSE}


def test_dense_attention_of_a_length_that_would_take_too_long_is_not_begun_later(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", [], Machine("made up", 1, FULL))
    rows.add({"piece": "operator", "pattern": DENSE, "ranks": 1, "way": RING, "S": 1 << 18, "seconds": 2.0})
    cases = [next(search) for search in planned(options(arguments=["--pieces", "operator"]), rows)]
    (dense,) = (settings for case in cases for settings in case.batch if settings["pattern"] == DENSE)
    assert dense["lengths"] == [1 << 15, 1 << 16, 1 << 17]


@pytest.mark.parametrize(("gpus", "model"), [(4, "1b"), (8, "1b"), (8, "8b")])
def test_searches_find_the_longest_context_of_the_bill(gpus, model, tmp_path):
    _, rows = played(tmp_path, gpus, "--pieces", "contexts", "--model", model)
    for ranks in (ranks for ranks in (1, 2, 4, 8) if ranks <= gpus):
        for way in (HALO, GATHER, RING) if ranks > 1 else (HALO, RING):
            tried = [row for row in rows if row["ranks"] == ranks and row["way"] == way]
            found = max((row["S"] for row in tried if "failed" not in row), default=0)
            contexts = (1 << power for power in range(15, 23))
            fits = [n for n in contexts if predicted(step_of(f"cp={ranks}", n, way, model=model).batch[0]) <= FULL]
            assert found == max(fits, default=0) and len(tried) <= 4


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_tables_of_a_whole_measurement_have_no_holes(gpus, tmp_path):
    _, rows = played(tmp_path, gpus)
    text = tables(lambda head, body: "\n".join("|".join(line) for line in (head, *body)), rows)
    for name in ("operator|131,072", "step of 1 B|32,768"):
        assert f"{name}|{gpus}|" + f"{gpus}.00|" * 3 + "1.00|1.00|" in text, name
    assert "in bold" not in text and "**" not in text  # the bill is the measurement here
    fewest = [fewest_ranks(MODELS["1b"], PATTERN, 1 << 20, FULL, way, 4096) for way in (HALO, GATHER, RING)]
    assert f"\n1,048,576|{'|'.join(map(str, fewest))}\n" in text
    speeds = "|".join(f"{2**power}" for power in range(gpus.bit_length()))
    assert f"131,072|halo|{speeds}|{gpus}" in text
    assert f"resumed as {Layout(cp=gpus // 2)}" in text and "SIGSTOP to rank 1" in text


def test_a_bill_that_is_off_is_flagged_and_a_failed_repetition_changes_no_table():
    row = ABOUT | {"piece": "step", "ranks": 2} | step_of("cp=2", 32768).batch[0]
    measured = {"parameters": 1e9, "tokens/s": 1.0, "seconds": 1.0}
    rows = [row | measured | {"peak GiB": share * predicted(row) / 2**30} for share in (1.0, 1.2)]
    assert latest(rows) == rows[1:] and latest([*rows, row | {"failed": "time limit"}]) == rows[1:]
    text = tables(lambda head, body: "\n".join("|".join(line) for line in (head, *body)), rows)
    assert "off by more than 10% in 1 rows, in bold" in text and "**0.83**" in text


def test_a_number_of_gpus_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"--gpus 8: this machine has 4\."):
        played(tmp_path, 4, "--gpus", "8")
    with pytest.raises(SystemExit):
        options(arguments=["--gpus", "3"])
    assert "'3' is no power of two" in capsys.readouterr().err
