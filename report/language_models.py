"""Tables of the language models: perplexity beside the baseline on both held-out parts, fit, transfer and gates."""

from __future__ import annotations

import math
from statistics import fmean

from experiments.experiment import Result
from experiments.registry import EXPERIMENTS
from experiments.rows import Row
from experiments.variants import BASELINE, COORDINATED_HEADS, DILATED_HEADS
from report.cells import Cell, by_seed, grouped, heading, mean_of, measured_cells, percent_above, shown
from report.keys import mean_keys
from report.markdown import NOTHING, table

TOO_EARLY = "**Too early to rank.** Dense attention is behind a window here, so they have hardly learned to copy."


def is_too_early(members: list[Cell]) -> bool:
    """Whether training stopped before dense attention was ahead of the baseline."""
    dense, base = by_seed(members, "dense"), by_seed(members, BASELINE)
    return bool(dense and base) and fmean(dense.values()) > fmean(base.values())


def percent(members: list[Cell], variant: str, other: str, part: str = "test") -> list[float]:
    """By how many percent the perplexity of a variant is above that of another, for each seed of both."""
    return percent_above(by_seed(members, variant, part), by_seed(members, other, part))


def _gap_closed(members: list[Cell], variant: str) -> list[float]:
    """Percent of the way from the baseline to dense attention, in nats."""
    ours, base, dense = (by_seed(members, name) for name in (variant, BASELINE, "dense"))
    paired = [seed for seed in ours if seed in base and seed in dense]
    return [100 * math.log(base[seed] / ours[seed]) / math.log(base[seed] / dense[seed]) for seed in paired]


def _last_eighth(results: list[Result]) -> str:
    known = [r["by position"][-1] for r in results if "by position" in r]
    return shown(known, 3) if known else "–"


def _gate(results: list[Result]) -> str:
    gates = [r["gate"]["by head"] for r in results if "gate" in r]
    if not gates:
        return "–"
    layers = zip(*[[sum(heads) / len(heads) for heads in gate] for gate in gates], strict=True)
    return ", ".join(f"{sum(values) / len(values):.2f}" for values in layers)


def perplexities(name: str) -> str:
    """Perplexity of each variant, and its distance from the baseline on test and validation documents."""
    parts = []
    for common, members in grouped(name):
        compares, early = bool(by_seed(members, BASELINE)), is_too_early(members)
        ahead = compares and bool(by_seed(members, "dense")) and not early
        lines = [_perplexity(name, members, cell, rows, compares, ahead) for cell, rows in members]
        gaps = ["from ring-local, test, %", "validation, %"] if compares else []
        closed = ["of the gap to dense, %"] if ahead else []
        head = ["variant", "keys a query", "test perplexity", *gaps, *closed, "last eighth", "seeds", "rate"]
        said = heading(common, members) + (f"\n\n{TOO_EARLY}" if early else "")
        parts.append(said + "\n\n" + table(head, lines))
    return "\n\n".join(parts) or NOTHING


def _perplexity(
    name: str, members: list[Cell], cell: dict[str, object], rows: list[Row], compares: bool, ahead: bool
) -> list[str]:
    results, variant = [row["result"] for row in rows], str(cell["variant"])
    line = [variant, f"{mean_keys(name, cell):,.1f}", shown([result["test"] for result in results], 3)]
    if compares:
        found = [percent(members, variant, BASELINE, part) for part in ("test", "validation")]
        line += ["–" if variant == BASELINE or not values else shown(values, 1) for values in found]
    if ahead:
        line.append("–" if variant in (BASELINE, "dense") else shown(_gap_closed(members, variant), 0))
    return [*line, _last_eighth(results), str(len(rows)), f"{rows[0]['settings']['rate']:g}"]


def more(name: str) -> str:
    """What the training documents were fitted to, transfer to other text, and the gates, of rows of several seeds."""
    lines = []
    words = mean_of("wikitext-103 word perplexity", 0)
    for _, members in grouped(name):
        for cell, rows in members:
            results = [row["result"] for row in rows]
            if len(rows) > 1:
                losses = [fmean(r["training loss"] for r in results), fmean(math.log(r["validation"]) for r in results)]
                line = [cell["variant"], *(f"{loss:.2f}" for loss in losses), words(results), _gate(results)]
                lines.append(line)
    head = ["variant", "last batch, nats", "validation, nats", "WikiText-103, word perplexity", "mean gate by layer"]
    return table(head, lines) if lines else NOTHING


FUSIONS = {
    "one period": ("pi", "pi, mass gate", "pi, no gate"),
    "dilated heads": (DILATED_HEADS, None, "pi, dilated heads, no gate"),
    "coordinated heads": ("pi, coordinated heads, gate", "pi, coordinated heads, mass gate", COORDINATED_HEADS),
}
"""By pattern: the variants with the gate of the paper, with a gate that starts from one softmax, with one softmax."""


def fusions() -> str:
    """Perplexity with a learned gate above that of one softmax over both bands, by pattern."""
    _, members = next(group for group in grouped("language_modelling_long") if group[0]["corpus"] == "linux")
    lines = []
    for pattern, (*gated, plain) in FUSIONS.items():
        found = [
            "–" if variant is None else shown(percent(members, variant, str(plain), part), 1)
            for variant in gated
            for part in ("test", "validation")
        ]
        lines.append([pattern, *found])
    head = ["pattern", "gate, test, %", "validation, %", "mass gate, test, %", "validation, %"]
    return table(head, lines)


def gates() -> str:
    """What the gates of the language models learned."""
    lines = []
    for cell, rows in measured_cells(EXPERIMENTS["language_modelling"]):
        found = [row["result"]["gate"] for row in rows if "gate" in row["result"]]
        if not found or cell["variant"] == "pi, fixed half":
            continue
        heads = [head for gate in found for layer in gate["by head"] for head in layer]
        ends = [fmean(gate["by position"][place] for gate in found) for place in (0, -1)]
        classes = [gate["by token class"] for gate in found if "by token class" in gate]
        names = sorted({name for means in classes for name in means})
        of_class = {name: fmean(means[name] for means in classes if name in means) for name in names}
        lines.append(
            [
                f"{cell['corpus']}, {cell['context']:,}, {cell['variant']}",
                str(len(found)),
                f"{min(heads):.2f} to {max(heads):.2f}",
                f"{fmean(gate['spread'] for gate in found):.3f}",
                f"{ends[0]:.3f}, {ends[1]:.3f}",
                ", ".join(f"{name} {mean:.3f}" for name, mean in of_class.items()) or "–",
            ]
        )
    head = [
        "corpus, context, variant",
        "seeds",
        "means of heads",
        "spread over tokens",
        "first and last eighth",
        "by class of the token",
    ]
    return table(head, lines) if lines else NOTHING
