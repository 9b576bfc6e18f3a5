"""Where language models differ from a window: over documents, and by where the bigram before a token last stood."""

from __future__ import annotations

import math
from statistics import fmean

from experiments.forms import BASELINE
from experiments.rows import Row
from report.cells import Cell, grouped, heading, of_seeds, paired, shown
from report.markdown import NOTHING, table

KINDS = ("new", "within", "within, repeated", "beyond", "beyond, repeated")


def over_documents(rows: list[Row], base: list[Row], part: str = "test") -> list[float]:
    """By how many percent the perplexity of each document is above the baseline's, in the mean over paired seeds."""
    ours, others = (of_seeds(of, lambda result: result["loss by document"][part]) for of in (rows, base))
    gaps = [
        [100 * math.expm1(loss - other) for loss, other in zip(*of_seed, strict=True)]
        for of_seed in paired(ours, others)
    ]
    return [fmean(of_document) for of_document in zip(*gaps, strict=True)]


def by_recurrence(rows: list[Row], base: list[Row], kind: str) -> list[float]:
    """By how many nats the loss of tokens of a kind is above the baseline's, for each paired seed."""
    ours, others = (of_seeds(of, lambda result: result["by recurrence"][kind][0]) for of in (rows, base))
    return [loss - other for loss, other in paired(ours, others)]


def slices(groups: list[tuple[dict[str, object], list[Cell]]]) -> str:
    """A table for each group whose baseline kept these losses."""
    parts = []
    for common, members in groups:
        base = next((rows for cell, rows in members if cell["variant"] == BASELINE), [])
        kept = [(cell, rows) for cell, rows in members if all("by recurrence" in row["result"] for row in rows)]
        if not base or (BASELINE not in {cell["variant"] for cell, _ in kept}):
            continue
        shares = [base[0]["result"]["by recurrence"][kind][1] for kind in KINDS]
        whole = sum(shares[i] for i in (0, 1, 3))
        head = [f"{kind} ({share / whole:.0%})".replace("%", " %") for kind, share in zip(KINDS, shares, strict=True)]
        lines = [
            [
                cell["variant"],
                *(shown(over_documents(rows, base, part), 1) for part in ("test", "validation")),
                *(shown(by_recurrence(rows, base, kind), 3) for kind in KINDS),
                str(len(rows)),
            ]
            for cell, rows in kept
            if cell["variant"] != BASELINE
        ]
        head = ["variant", "test documents, %", "validation, %", *(f"{said}, nats" for said in head), "seeds"]
        parts.append(heading(common, members) + "\n\n" + table(head, lines))
    return "\n\n".join(parts) or NOTHING


def of_experiment(name: str) -> str:
    """The tables of an experiment's rows."""
    return slices(grouped(name))
