"""Tables of results/multigpu.jsonl: the operator, its scaling, training steps beside the bill, contexts, whole runs."""

from __future__ import annotations

from benchmarks.multigpu.rows import FILE, Row, read
from benchmarks.multigpu.ways import GATHER, HALO, RING
from report.multigpu_rows import LABELS, NONE, Table, found, latest, model_name, of_widest, shared, values
from report.multigpu_steps import contexts, layouts, throughput


def tables(table: Table, rows: list[Row] | None = None) -> str:
    """Every table, of the kind of GPU of which most were measured together.

    Args:
        table: makes one.
        rows: of the result file when None.
    """
    rows = of_widest(latest(read(FILE) if rows is None else rows))
    parts = [
        f"{last['gpu']}, torch {last['torch']}, triton {last['triton']}, {last['date'][:10]}." for last in rows[-1:]
    ]
    made = (_checks, _operator, _patterns, _scaling, layouts, contexts, throughput, _runs)
    parts += [part(table, rows) for part in made]
    return "\n\n".join(filter(None, parts)) or "Not measured yet."


def _about(table: Table, rows: list[Row]) -> str:
    return "".join(
        f"{row['gpu']}, torch {row['torch']}, triton {row['triton']}, {row['date'][:10]}." for row in rows[-1:]
    )


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
    for ranks in values(rows, "ranks", piece="operator"):
        for length in values(rows, "S", piece="operator", ranks=ranks):
            at = {"piece": "operator", "ranks": ranks, "S": length}
            cells = [_cell(found(rows, **at, way=way, pattern="one period")) for way in (HALO, GATHER)]
            body.append([str(ranks), f"{length:,}", *cells, _cell(found(rows, **at, way=RING))])
    head = ["GPUs", "tokens in all", *LABELS.values()]
    text = "The operator, forward + backward; in brackets the part that messages take beyond what overlaps.\n\n"
    return text + table(head, body) if body else ""


def _patterns(table: Table, rows: list[Row]) -> str:
    body = []
    measured = [row for row in rows if row["piece"] == "operator" and row.get("way", RING) != RING]
    for name in dict.fromkeys(row["pattern"] for row in measured):
        of_name = [row for row in measured if row["pattern"] == name]
        ranks, length = max((row["ranks"], row["S"]) for row in of_name)
        cells = [found(of_name, ranks=ranks, S=length, way=way) for way in (HALO, GATHER)]
        halo = f"{cells[0]['halo rows']:,}" if cells[0] else NONE
        body.append([name, str(ranks), f"{length:,}", halo, *map(_cell, cells)])
    head = ["pattern", "GPUs", "tokens in all", "halo, tokens a GPU", "halo", "all-gather"]
    return table(head, body) if body else ""


def _speed(rows: list[Row], one: int, ranks: int, way: str, grown: int) -> str:
    """One GPU's time over that of several, for `grown` times its tokens a unit of work; of one kind of work."""
    alone = found(rows, way=HALO if way == GATHER else way, S=one, ranks=1)  # one GPU has all keys
    several = found(rows, way=way, S=grown * one, ranks=ranks)
    if alone is None or several is None or not {"seconds"} <= alone.keys() & several.keys():
        return NONE
    return f"{alone['seconds'] / several['seconds']:.2f}"


def _scaling(table: Table, rows: list[Row]) -> str:
    """Strong: the same sequence on more GPUs; weak: as many tokens a GPU."""
    operator = [row for row in rows if row["piece"] == "operator" and row.get("pattern") in ("one period", "dense")]
    work = {"operator": operator}
    for model in values(rows, "model", piece="step"):
        work[f"step of {model_name(model)}"] = shared(rows, model)
    body = []
    for name, measured in work.items():
        for length in values(measured, "S", ranks=1):
            for ranks in (n for n in values(measured, "ranks") if n > 1):
                cells = [_speed(measured, length, ranks, way, grown) for grown in (1, ranks) for way in LABELS]
                if set(cells) != {NONE}:
                    body.append([name, f"{length:,}", str(ranks), *cells])
    head = ["", "tokens on one GPU", "GPUs", *(f"{kind}, {way}" for kind in ("strong", "weak") for way in LABELS)]
    text = (
        "Scaling: the time of one GPU over that of several, on the same sequence (strong; ideal is their number) and "
    )
    return text + "on as many tokens a GPU (weak; ideal is 1 for the halo).\n\n" + table(head, body) if body else ""


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
