"""Tables of converted pretrained models."""

from __future__ import annotations

from collections.abc import Callable

from report.markdown import NOTHING, RESULTS, Measured, per_file, read, table, version


def _conversion(result: Measured) -> str:
    rows = [
        [
            f"{row['S']:,}",
            row["variant"],
            row["trained"] if row["trained"] == "nothing" else f"{row['trained']}, {row['steps']} steps",
            f"{row['perplexity']:.2f}",
            f"{row['over dense']:.3f} ({row['interval'][0]:.3f} to {row['interval'][1]:.3f})",
            str(row["chunks"]),
        ]
        for row in result["rows"]
    ]
    said = f"{result['model']}, {result['text']}; {result.get('device', 'CPU, fp32')}, {version(result)}"
    head = ["context", "attention", "trained", "perplexity", "over dense (95 %)", "chunks"]
    return said + ".\n\n" + table(head, rows)


def conversion() -> str:
    """Perplexity of converted pretrained models."""
    return per_file("conversion-*", _conversion)


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
