"""Tables of converted pretrained models."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter
from statistics import fmean

from experiments.experiment import Result
from experiments.pretrained import ALIKE, BEST, SAME_TIME, WHOLE
from experiments.rows import Row
from report.cells import Cell, by_seed, grouped, heading, measured_on, of_seeds, paired, percent_above, shown
from report.keys import mean_keys
from report.markdown import NOTHING, RESULTS, Measured, per_file, read, table, version
from report.slices import by_recurrence


def _conversion(result: Measured) -> str:
    rows = [
        [
            f"{row['S']:,}",
            row["variant"],
            row["trained"] if row["trained"] == "nothing" else f"{row['trained']}, {row['steps']} steps",
            f"{row['perplexity']:.2f}",
            _over_dense(row),
            str(row["chunks"]),
        ]
        for row in result["rows"]
    ]
    said = f"{result['model']}, {result['text']}; {result.get('device', 'CPU, fp32')}, {version(result)}"
    head = ["context", "attention", "trained", "perplexity", "over dense (95 %)", "chunks"]
    return said + ".\n\n" + table(head, rows)


def _over_dense(row: Measured) -> str:
    first, last = row["interval"]
    return f"{row['over dense']:.3f} ({first:.3f} to {last:.3f})"


def conversion() -> str:
    """Perplexity of converted pretrained models."""
    return per_file("conversion-*", _conversion)


def _dense_layers(result: Measured) -> str:
    nats = {row["dense layers"]: math.log(row["perplexity"]) for row in result["rows"]}
    rows = [
        [
            row["dense layers"],
            "–" if not row["kept"] else ", ".join(map(str, row["kept"])),
            f"{row['perplexity']:.2f}",
            _over_dense(row),
            f"{(nats['none'] - math.log(row['perplexity'])) / (nats['none'] - nats['all']):.0%}",
        ]
        for row in result["rows"]
    ]
    gains = ", ".join(f"{round(1000 * gain) + 0}" for gain in result["nats given back"])
    layers = result["layers"]
    alike = layers == list(range(layers[0], layers[-1] + 1))
    which = f"{layers[0]} to {layers[-1]}" if alike else ", ".join(map(str, layers))
    said = f"{result['model']}, {result['rows'][0]['chunks']} chunks of {result['S']:,} tokens of {result['text']}, "
    said += f"chosen on {result['blocks']} of {result['chosen on']}; {result['device']}, {version(result)}. One of the "
    said += f"layers {which}, dense alone, gives back, in thousandths of a nat: {gains}"
    head = ["dense layers", "which", "perplexity", "over dense (95 %)", "of the gap in nats closed"]
    return said + ".\n\n" + table(head, rows)


def dense_layers() -> str:
    """What it gives to keep some layers of a pretrained model dense, by how they are chosen."""
    return per_file("layers-*", _dense_layers)


def _streaming(result: Measured) -> str:
    found = result["streaming"]
    head = ["tokens", *(f"{row['variant']}, trained: {row['trained']}" for row in found)]
    starts = [*found[0]["first position"][1:], result["tokens"]]
    rows = [
        [f"{first:,} to {end:,}", *(f"{row['perplexity'][i]:.2f}" for row in found)]
        for i, (first, end) in enumerate(zip(found[0]["first position"], starts, strict=True))
    ]
    rows.append(["cache", *(f"{row['cache bytes'] / 2**20:,.0f} MiB" for row in found)])
    said = f"{result['model']}, {result['text']}; {result['device']}, {version(result)}"
    return said + ".\n\n" + table(head, rows)


def streaming() -> str:
    """Perplexity while a long text streams through a bounded cache."""
    return per_file("streaming-*", _streaming)


def _speed(result: Measured) -> str:
    dense = {row["context"]: row for row in result["speed"] if row["variant"] == "dense"}
    measured = {name: column for name, column in TIMES.items() if any(name in row for row in result["speed"])}
    rows = []
    for row in result["speed"]:
        cells, beside = [f"{row['context']:,}", row["variant"]], dense[row["context"]]
        for name, (_, told) in measured.items():
            known = name in row and name in beside
            cells += [told(row[name]), f"{row[name] / beside[name]:.2f}×"] if known else ["–", "–"]
        rows.append(cells)
    said = f"{result['model']}; {result['device']}, batch 1, bf16, {version(result)}"
    head = ["context", "model"]
    for title, _ in measured.values():
        head += [title, "time ÷ dense's"]
    return said + ".\n\n" + table(head, rows)


TIMES: dict[str, tuple[str, Callable[[float], str]]] = {
    "prefill s": ("prefill, ms", lambda seconds: f"{1e3 * seconds:,.0f}"),
    "decode s": ("a decoded token, ms", lambda seconds: f"{1e3 * seconds:,.1f}"),
    "static, first two tokens s": ("static cache, first two tokens, s", lambda seconds: f"{seconds:.1f}"),
    "static, decode s": ("static cache, a token, ms", lambda seconds: f"{1e3 * seconds:,.1f}"),
}
"""Columns by the name of the row's figure."""


def speed() -> str:
    """Prefill and decoding of a converted model beside the dense original."""
    return per_file("speed-*", _speed)


def trained_on() -> str:
    """Forms of a decoder after training: perplexity beside a window or dense attention, where it differs, pass keys."""
    groups, of_time = grouped("pretrained"), SAME_TIME.values()
    parts = [_trained_on(common, members) for common, members in groups if common["steps"] not in of_time]
    in_time = [_in_same_time(members) for _, members in grouped("pretrained", ("variant", "steps"))]
    return "\n\n".join([*parts, *filter(None, in_time)]) or NOTHING


def _in_same_time(members: list[Cell]) -> str:
    """Forms that trained as long as the best one did, beside it; nothing where there are none."""
    timed = [cell for cell in members if cell[0]["steps"] == SAME_TIME.get(cell[0]["variant"])]
    if not timed:
        return ""
    best = min((cell for cell in members if cell[0]["variant"] == BEST), key=lambda cell: cell[0]["steps"])
    lines = []
    for settings, rows in [best, *timed]:
        gaps = [percent_above(*(of_seeds(of, itemgetter(part)) for of in (rows, best[1]))) for part in PARTS]
        line = [settings["variant"], f"{settings['steps'] * settings['context'] / 1e6:.0f} M"]
        line.append(shown([row["result"]["test"] for row in rows], 2))
        line += ["–" if rows is best[1] or not gap else shown(gap, 1) for gap in gaps]
        lines.append([*line, str(len(rows))])
    head = ["variant", "tokens", "test perplexity", "from the first, test, %", "validation, %", "seeds"]
    said = "As much time of training as the first, without that of choosing its layers. "
    return said + measured_on([row for _, rows in timed for row in rows]) + ".\n\n" + table(head, lines)


def _trained_on(common: dict[str, object], members: list[Cell]) -> str:
    measured = {str(cell["variant"]): rows for cell, rows in members}
    first = ALIKE if ALIKE in measured else WHOLE
    base, lines, places = measured.get(first, []), [], []
    for cell, rows in members:
        variant, results = str(cell["variant"]), [row["result"] for row in rows]
        beside = [percent_above(by_seed(members, variant, part), by_seed(members, first, part)) for part in PARTS]
        short = [fmean(result["short"][i] for result in results) for i in (0, 1)]
        lines.append(
            [
                variant,
                f"{mean_keys('pretrained', cell):,.1f}",
                f"{fmean(result['untrained'] for result in results):.2f}",
                shown([result["test"] for result in results], 2),
                *("–" if variant == first or not values else shown(values, 1) for values in beside),
                f"{short[0]:.1f}",
                f"{short[1]:.1f}",
                _tokens_a_second(results),
                str(len(rows)),
            ]
        )
        places.append([variant, *(_nats(rows, base, kind) for kind in ("within", "beyond")), _by_eighth(rows, base)])
        places[-1] += [_pass_keys(results, length) for length in results[0]["pass keys"]]
    gaps = [f"from {first}, test, %", "validation, %"]
    head = ["variant", "keys a query", "untrained", "test perplexity", *gaps, "short texts, untrained", "trained"]
    where = ["variant", "within, nats", "beyond, nats", "by eighth of the text, %"]
    where += [f"pass keys, {int(length):,}" for length in base[0]["result"]["pass keys"]] if base else []
    tables = [table([*head, "tokens/s", "seeds"], lines)] + ([table(where, places)] if base else [])
    return "\n\n".join([heading(common, members), *tables])


PARTS = ("test", "validation")


def _tokens_a_second(results: list[Result]) -> str:
    known = [result["tokens/s"] for result in results if "tokens/s" in result]
    return f"{fmean(known):,.0f}" if known else "–"


def _nats(rows: list[Row], base: list[Row], kind: str) -> str:
    return "–" if rows is base or not base else shown(by_recurrence(rows, base, kind), 2)


def _by_eighth(rows: list[Row], base: list[Row]) -> str:
    """By how many percent the perplexity is above that of the base, from the beginning to the end."""
    pairs = paired(*(of_seeds(of, lambda result: result["by position"]) for of in (rows, base)))
    if rows is base or not pairs:
        return "–"
    return ", ".join(f"{fmean(100 * (ours[i] / other[i] - 1) for ours, other in pairs):.1f}" for i in range(8))


def _pass_keys(results: list[Result], length: str) -> str:
    """The shares that are found, by depth from the beginning to the end."""
    return ", ".join(
        f"{fmean(of_depth):.2f}" for of_depth in zip(*(r["pass keys"][length] for r in results), strict=True)
    )


def support() -> str:
    """What the tests of each version of transformers say."""
    results = [read(file.stem) for file in sorted(RESULTS.glob("support-*.json"))]
    if not results:
        return NOTHING

    def cell(counts: dict[str, int]) -> str:
        words = {"passed": "tests passed", "skipped": "skipped", "failed": "**failed**"}
        return ", ".join(f"{counts[kind]} {word}" for kind, word in words.items() if kind in counts) or "–"

    rows = [[feature, *(cell(r["features"].get(feature, {})) for r in results)] for feature in results[-1]["features"]]
    versions = [
        ", ".join(f"{name} {result[name]}" for name in ("transformers", "torch") if name in result)
        for result in results
    ]
    return table(["", *versions], rows)
