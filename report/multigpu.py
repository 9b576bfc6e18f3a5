"""Tables of results/multigpu.jsonl: the operator, its scaling, training steps beside the bill, contexts, whole runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.multigpu.rows import FILE, OUT_OF_MEMORY, Row, read
from benchmarks.multigpu.step import predicted
from benchmarks.multigpu.ways import GATHER, HALO, RING

Table = Callable[[list[str], list[list[str]]], str]
"""A Markdown table of a head and rows."""
LABELS = {HALO: "halo", GATHER: "all-gather", RING: "dense Ring Attention"}
NONE = "–"


def tables(table: Table, rows: list[Row] | None = None) -> str:
    """Every table, one GPU kind after another.

    Args:
        table: makes one.
        rows: of the result file when None.
    """
    rows = read(FILE) if rows is None else rows
    parts = []
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        of_gpu = [row for row in rows if row["gpu"] == gpu]
        last = of_gpu[-1]
        parts.append(f"{gpu}, torch {last['torch']}, triton {last['triton']}, {last['date'][:10]}.")
        made = (_checks, _operator, _patterns, _scaling, _layouts, _contexts, _throughput, _runs)
        parts += [part(table, of_gpu) for part in made]
    return "\n\n".join(filter(None, parts)) or "Not measured yet."


def _found(rows: Iterable[Row], **settings: Any) -> Row | None:
    """The last row of these settings that was measured; `_` in a name is a space."""
    wanted = {name.replace("_", " "): value for name, value in settings.items()}
    found = [row for row in rows if "failed" not in row and wanted.items() <= row.items()]
    return found[-1] if found else None


def _all(rows: Iterable[Row], name: str, **settings: Any) -> list[Any]:
    """The values of a field in rows of these settings, sorted."""
    return sorted({row[name] for row in rows if name in row and settings.items() <= row.items()})


def _checks(table: Table, rows: list[Row]) -> str:
    errors: dict[str, float] = {}
    for row in rows:
        if row["piece"] == "check":
            for way, error in row["largest relative error"].items():
                errors[way] = max(error, errors.get(way, 0.0))
    said = ", ".join(f"{LABELS[way]} {error:.1e}" for way, error in errors.items())
    return said and f"Largest relative error of outputs and gradients against one GPU: {said}."


def _cell(row: Row | None) -> str:
    """Milliseconds, of which exposed, and the peak."""
    if row is None:
        return NONE
    exposed = ""
    if "without messages s" in row:
        exposed = f" ({max(0.0, 1e3 * (row['seconds'] - row['without messages s'])):.1f})"
    return f"{1e3 * row['seconds']:.1f}{exposed} ms, {row['peak GiB']:.1f} GiB"


def _operator(table: Table, rows: list[Row]) -> str:
    body = []
    for ranks in _all(rows, "ranks", piece="operator"):
        for length in _all(rows, "S", piece="operator", ranks=ranks):
            at = {"piece": "operator", "ranks": ranks, "S": length}
            cells = [_cell(_found(rows, **at, way=way, pattern="one period")) for way in (HALO, GATHER)]
            body.append([str(ranks), f"{length:,}", *cells, _cell(_found(rows, **at, way=RING))])
    head = ["GPUs", "tokens in all", *LABELS.values()]
    text = "The operator, forward + backward; in brackets the part that messages take beyond what overlaps.\n\n"
    return text + table(head, body) if body else ""


def _patterns(table: Table, rows: list[Row]) -> str:
    body = []
    measured = [row for row in rows if row["piece"] == "operator" and row.get("way", RING) != RING]
    for name in dict.fromkeys(row["pattern"] for row in measured):
        of_name = [row for row in measured if row["pattern"] == name]
        ranks, length = max((row["ranks"], row["S"]) for row in of_name)
        cells = [_found(of_name, ranks=ranks, S=length, way=way) for way in (HALO, GATHER)]
        halo = f"{cells[0]['halo rows']:,}" if cells[0] else NONE
        body.append([name, str(ranks), f"{length:,}", halo, *map(_cell, cells)])
    head = ["pattern", "GPUs", "tokens in all", "halo, tokens a GPU", "halo", "all-gather"]
    return table(head, body) if body else ""


def _speed(rows: list[Row], piece: str, one: int, ranks: int, way: str, grown: int) -> str:
    """One GPU's time over that of several, for `grown` times its tokens a unit of work."""
    settings = {"piece": piece, "way": way}
    if way != RING or piece == "step":
        settings["pattern"] = "one period"
    if piece == "step":
        settings |= {"model": "1b", "loss slice": 4096, "zero": 3}
        alone = _found(rows, **settings, S=one, ranks=1)
        several = _found(rows, **settings, S=grown * one, ranks=ranks, layout=f"dp=1,tp=1,cp={ranks}")
    else:
        alone, several = (_found(rows, **settings, S=n, ranks=r) for n, r in ((one, 1), (grown * one, ranks)))
    if alone is None or several is None or not {"seconds"} <= alone.keys() & several.keys():
        return NONE
    return f"{alone['seconds'] / several['seconds']:.2f}"


def _scaling(table: Table, rows: list[Row]) -> str:
    """Strong: the same sequence on more GPUs; weak: as many tokens a GPU."""
    body = []
    for piece, name in (("operator", "operator"), ("step", "step of 1 B")):
        for length in _all(rows, "S", piece=piece, ranks=1):
            for ranks in (n for n in _all(rows, "ranks", piece=piece) if n > 1):
                cells = [_speed(rows, piece, length, ranks, way, grown) for grown in (1, ranks) for way in (HALO, RING)]
                if set(cells) != {NONE}:
                    body.append([name, f"{length:,}", str(ranks), *cells])
    head = ["", "tokens on one GPU", "GPUs", "strong, halo", "strong, dense ring", "weak, halo", "weak, dense ring"]
    text = (
        "Scaling: the time of one GPU over that of several, on the same sequence (strong; ideal is their number) and "
    )
    return text + "on as many tokens a GPU (weak; ideal is 1 for the halo).\n\n" + table(head, body) if body else ""


def _layouts(table: Table, rows: list[Row]) -> str:
    body = []
    for row in rows:
        if row["piece"] == "step" and row.get("peak GiB") and not row["hollow"]:
            size = f"{row['parameters'] / 1e9:.1f} B" + (f", {row['layers']} layers" if row["layers"] else "")
            sliced = "whole" if row["loss slice"] is None else f"{row['loss slice']:,}"
            way = LABELS[row["way"]] + ("" if row["pattern"] == "one period" else f", {row['pattern']}")
            bill = predicted(row) / 2**30  # of today, not of the day of the measurement
            figures = [f"{row['tokens/s']:,.0f}", f"{row['peak GiB']:.1f} GiB", f"{bill:.1f} GiB"]
            ratio = f"{bill / row['peak GiB']:.2f}"
            body.append([size, row["layout"], str(row["zero"]), f"{row['S']:,}", way, sliced, *figures, ratio])
    head = ["model", "layout", "ZeRO", "tokens of a sequence", "keys by", "loss", "tokens/s", "peak", "bill", "ratio"]
    caption = (
        'Training steps beside the bill. "Keys by" is how the keys of other GPUs arrive; "loss" is how many tokens '
        "have logits at once."
    )
    return f"{caption}\n\n{table(head, body)}" if body else ""


def _longest(rows: list[Row], way: str, ranks: int) -> tuple[int, bool]:
    """The longest sequence of a 1 B step that fitted, and whether a longer one did not."""
    asked = {"piece": "step", "model": "1b", "way": HALO if ranks == 1 and way == GATHER else way, "loss slice": 4096}
    asked |= {"layout": f"dp=1,tp=1,cp={ranks}", "zero": 3, "pattern": "one period"}
    tried = [row for row in rows if asked.items() <= row.items()]
    fits = max((row["S"] for row in tried if "failed" not in row), default=0)
    return fits, any(row.get("failed") == OUT_OF_MEMORY and row["S"] > fits for row in tried)


def _contexts(table: Table, rows: list[Row]) -> str:
    counts = [int(layout.rpartition("=")[2]) for layout in _all(rows, "layout", model="1b", way=HALO)
              if layout.startswith("dp=1,tp=1,")]  # fmt: skip
    found = {way: {ranks: _longest(rows, way, ranks) for ranks in counts} for way in LABELS}
    if not any(bounded for of_way in found.values() for _, bounded in of_way.values()):
        return ""
    longest = [
        [
            LABELS[way],
            *((f"{fits:,}" if bounded else f"≥ {fits:,}") if fits else NONE for fits, bounded in each.values()),
        ]
        for way, each in found.items()
    ]
    lengths = sorted({fits for each in found.values() for fits, _ in each.values() if fits})
    fewest = [
        [f"{length:,}"]
        + [str(next((n for n, (fits, _) in found[way].items() if fits >= length), NONE)) for way in found]
        for length in lengths
    ]
    return (
        "The longest sequence, a power of two, of a training step of 1 B parameters that fits, by GPUs (loss by "
        "slices; dense beyond 131,072 tokens without its products):\n\n"
        + table(["", *map(str, counts)], longest)
        + "\n\nThe fewest GPUs for a context:\n\n"
        + table(["tokens", *LABELS.values()], fewest)
    )


def _throughput(table: Table, rows: list[Row]) -> str:
    """Tokens/s of a 1 B step by way and GPUs; and the fewest GPUs that are as fast as the largest dense ring."""
    body = []
    for length in _all(rows, "S", piece="step", way=RING, model="1b", hollow=False):
        speeds: dict[str, dict[int, float]] = {way: {} for way in LABELS}
        for way in LABELS:
            for ranks in _all(rows, "ranks", piece="step", way=way, model="1b", S=length):
                row = _found(rows, piece="step", way=way, model="1b", S=length, layout=f"dp=1,tp=1,cp={ranks}",
                             loss_slice=4096, pattern="one period", zero=3)  # fmt: skip
                if row is not None and "tokens/s" in row:
                    speeds[way][ranks] = row["tokens/s"]
        goal = max(speeds[RING].values(), default=0.0)
        for way, each in speeds.items():
            enough = next((ranks for ranks, speed in each.items() if speed >= goal), None)
            cells = [f"{each[n]:,.0f}" if n in each else NONE for n in (1, 2, 4)]
            body.append([f"{length:,}", LABELS[way], *cells, NONE if enough is None else str(enough)])
    head = ["tokens", "", "1 GPU", "2", "4", "fewest that reach the dense ring's best"]
    return "Tokens/s of a training step of 1 B parameters:\n\n" + table(head, body) if body else ""


def _runs(table: Table, rows: list[Row]) -> str:
    said = []
    for row in rows:
        if row["piece"] == "run" and "resumed from" in row:
            said.append(
                f"A run of {row['resumed from']}, resumed as {row['layout']} after step {row['at']}: its losses differ "
                f"by at most {row['largest difference']:.1e}."
            )
        if row["piece"] == "killed" and "signal" in row and "failed" not in row:
            named = "named" if row["named by a rank"] or row["named by torchrun"] else "not named"
            said.append(
                f"{row['signal']} to rank 1: the others ended after {row['others ended after s']:.0f} s, {named}."
            )
    return "\n".join(f"* {line}" for line in said)
