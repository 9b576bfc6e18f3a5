"""Tables of continuous batching, of the server, and of what forms of the pattern cost to serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.registry import EXPERIMENTS
from experiments.rows import Row
from report.cells import measured_cells, measured_on
from report.markdown import NOTHING, Measured, per_file, read, table, version


def serving() -> str:
    """A server under load."""
    result = read("serving-cpu")
    head = ["model", "clients", "minutes", "right texts", "wrong", "failed", "left early", "new tokens/s", "MiB"]
    rows = [
        [
            row["model"],
            str(row["clients"]),
            str(row["minutes"]),
            *(f"{row[name]:,}" for name in ("right", "wrong", "failed", "abandoned", "new tokens/s")),
            ", ".join(str(size) for size in row["MiB in each quarter"]),
        ]
        for row in result["rows"]
    ]
    return f"CPU, {version(result)}.\n\n" + table(head, rows)


def paged() -> str:
    """Bytes of continuous batching: one request as it grows, and many that share few pages."""
    result = read("paged")
    rows = [
        [row["layers"], f"{row['tokens']:,}", f"{row['bytes held']:,}", f"{row['bytes allocated']:,}"]
        for row in result["growing"]
    ]
    shared = result["evicted"]
    return (
        f"A tiny model of {result['model']['num_hidden_layers']} layers; CPU, {version(result)}.\n\n"
        + table(["layers", "tokens", "bytes of the request", "of the paged cache"], rows)
        + f"\n\n{shared['requests']} requests of together {shared['tokens']:,} tokens shared "
        f"{shared['bytes allocated']:,} bytes. Pages were taken from a request {shared['evictions']} times. "
        f"{shared['equal texts']} texts were those of `generate`."
    )


def _pair(row: dict[str, Any], told: Callable[[dict[str, Any]], str], none: str = "–") -> list[str]:
    """One figure of both models, or `none` where a model failed; a "{}" in it is the reason."""
    kinds = (row["original"], row["converted"])
    return [none.format(kind["failed"]) if "failed" in kind else told(kind) for kind in kinds]


def _throughput(result: Measured) -> str:
    rows = []
    for row in sorted(result["rows"], key=lambda row: (row["model"], row["prompt"], row["requests"])):
        texts = row["float32 texts"]
        cells = [row["model"], f"{row['prompt']:,}", str(row["requests"])]
        cells += _pair(row, lambda kind: f"{kind['new tokens/s']:,.0f}", "{}")
        cells += _pair(row, lambda kind: f"{kind['first token s']:.2f}")
        cells += _pair(row, lambda kind: f"{kind['bytes held'] / 2**20:,.1f}")
        cells += _pair(row, lambda kind: str(kind["at once"]))
        rows.append([*cells, f"{texts['equal']} of {texts['compared']}"])
    head = ["model", "prompt", "requests"]
    for name in ("new tokens/s", "first token, s", "cache held, MiB", "at once"):
        head += [f"{name}: dense", "converted"]
    said = f"{result['device']}, {result['dtype']}, {version(result)}"
    return (
        f"{said}, transformers {result['versions']['transformers']}; {result['new tokens']} new tokens a request.\n\n"
        + table([*head, "equal texts"], rows)
    )


def throughput() -> str:
    """A converted model and its dense original under the same continuous batching."""
    return per_file("throughput-*", _throughput)


CACHES = {"cache bytes after the prompt": "cache, MiB, after the prompt,", "cache bytes": "cache, MiB, while decoding,"}


def serving_cost() -> str:
    """What a form costs to serve, by length of the prompt."""
    found: dict[str, dict[int, Row]] = {}
    for cell, rows in measured_cells(EXPERIMENTS["serving_cost"]):
        found.setdefault(cell["variant"], {})[cell["context"]] = rows[0]
    if not found:
        return NOTHING
    row = next(iter(found["dense"].values()))
    lengths, settings = sorted(found["dense"]), row["settings"]

    longest = lengths[-1]
    lines = [
        [
            variant,
            *(f"{1e3 * of_length[n]['result']['first token s']:,.0f}" for n in lengths),
            f"{1e3 * of_length[longest]['result']['decoded token s']:.1f}",
            *(f"{of_length[longest]['result'][name] / 2**20:,.0f}" for name in CACHES),
        ]
        for variant, of_length in found.items()
    ]
    heads = [f"first token, ms, at {n:,}" for n in lengths]
    heads += [f"{what} at {longest:,}" for what in ("a token, ms,", *CACHES.values())]
    said = measured_on([row for of_length in found.values() for row in of_length.values()])
    said += (
        f"; {row['result']['parameters'] / 1e6:.0f} M parameters, {settings['layers']} layers, bf16, "
        f"{settings['keys']} keys a query; prompts in chunks of {settings['chunk']:,} tokens."
    )
    return said + "\n\n" + table(["variant", *heads], lines)
