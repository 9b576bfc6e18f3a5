"""The one table of the README: time and quality by context, beside dense attention and a window of as many keys."""

from __future__ import annotations

from statistics import fmean

from experiments.forms import BASELINE
from experiments.rows import Row
from report.cells import of_seeds, percent_above, shown
from report.gains import rows_of
from report.keys import PLANNED
from report.law import FORM
from report.markdown import read, table

CURRICULA = {8192: [1024, 2048, 4096], 32768: [1024, 2048, 4096, 8192, 16384]}
"""Contexts in which passkeys were asked for, and the shorter ones that training began with."""


LANGUAGE = {2048: "forms", 8192: "law"}
"""Experiments with language models of 80 keys, by context."""


def _against(rows: list[Row], others: list[Row]) -> str:
    """By how many percent the perplexity differs, over paired seeds."""
    gaps = percent_above(of_seeds(rows), of_seeds(others))
    sign, side = (1, "higher") if fmean(gaps) > 0 else (-1, "lower")
    return f"perplexity {shown([sign * gap for gap in gaps], 1)} % {side}"


def _found(rows: list[Row]) -> str:
    return f"{fmean(row['result']['test'] for row in rows):.0%}".replace("%", " %")


def summary() -> str:
    """Time of a training step as a multiple of π-attention's, and the quality that was measured at that context."""
    steps = {(row["S"], row["variant"]): row["step ms"] for row in read("step-nvidia-h200")["rows"]}
    rows = []
    for length in sorted({length for length, _ in steps}):
        times = [f"{steps[length, variant] / steps[length, 'pi']:.2f}×" for variant in ("dense", "ring-local")]
        quality: list[list[str]] = [[], []]
        if length in LANGUAGE:
            found = rows_of(LANGUAGE[length], {"context": length, "keys": 80, "heads": 4, "steps": 4000})
            for said, other in zip(quality, ("dense", BASELINE), strict=True):
                said.append(_against(found[FORM], found[other]))
        if length in CURRICULA:
            found = rows_of("recall", {"context": length, "shorter first": CURRICULA[length]})
            ours = _found(found[PLANNED])
            for said, (word, other) in zip(quality, (("dense", "dense"), ("window", BASELINE)), strict=True):
                said.append(f"passkeys found: {ours}, {word} {_found(found[other])}")
        rows.append([f"{length:,}", *times, *("; ".join(said) or "not measured" for said in quality)])
    times = ["time of dense ÷ ours", "of a window ÷ ours"]
    head = ["tokens", *times, "quality beside dense", "beside a window of as many keys"]
    return table(head, rows)
