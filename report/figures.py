"""The pictures of docs/, from the theory and from the result files; `python -m report` draws them."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.multigpu.rows import FILE, read
from benchmarks.theory import ONE_LAYER, fields
from benchmarks.timing import RESULTS
from pi_attention import plots
from pi_attention.bill import MODELS, WAYS, bill
from pi_attention.explorer import write_explorer
from pi_attention.heads import coordinated_heads
from pi_attention.models import PiConfig
from pi_attention.pattern import PiPattern
from report import gains, law, pareto
from report.gains import Lines
from report.multigpu_rows import latest, of_widest
from report.pattern import labelled_pattern

DOCS = RESULTS.parents[1] / "docs"
FIGURES = DOCS / "figures"


def volumes() -> Lines:
    """MiB that a rank receives for one layer of the 8 B model, forward and backward, by tokens; 64 ranks."""
    lengths = [2**power for power in range(14, 23)]
    pattern, labels = PiPattern(256, 256, 16), ("halo", "all-gather", "dense Ring Attention")
    return {
        label: [(length, bill(MODELS["8b"], pattern, length, 64, way).received / 2**20) for length in lengths]
        for way, label in zip(WAYS, labels, strict=True)
    }


def times_of_pieces() -> Lines:
    """Milliseconds of the operator by tokens of the sequence: on one GPU, and on the most that were measured."""
    rows = [row for row in of_widest(latest(read(FILE))) if row["piece"] == "operator" and "seconds" in row]
    rows = [row for row in rows if row["pattern"] in ("one period", "dense")]
    most = max(row["ranks"] for row in rows)
    lines: Lines = {}
    for row in sorted(rows, key=lambda row: (row["ranks"], row["S"])):
        if row["ranks"] in (1, most):
            label = f"{row['way']}, {row['ranks']} GPU{'s' if row['ranks'] > 1 else ''}"
            lines.setdefault(label, []).append((row["S"], 1e3 * row["seconds"]))
    return lines


def times_of_kernels(result: dict[str, Any]) -> Lines:
    """Milliseconds of the operator on one GPU by tokens of the sequence, beside dense attention and the floor."""
    lines: Lines = {}
    for row in result["rows"]:
        if row["pattern"] == result["rows"][0]["pattern"] and row["D"] == 128:
            kind = "forward+backward in graph us"
            kind = kind if kind in row["pi"] else "forward+backward us"
            for name, label in (("pi", "π-Attention"), ("sdpa causal", "dense causal SDPA")):
                if name in row:
                    lines.setdefault(label, []).append((row["S"], row[name][kind] / 1e3))
            lines.setdefault("floor", []).append((row["S"], row["floor forward+backward us"] / 1e3))
    return lines


def draw() -> None:
    """Write every picture, and the explorer page."""
    gains.draw(FIGURES)
    lengths = law.points(law.measured())
    if lengths:
        plots.save(law.picture(lengths), FIGURES / "law.svg")
    hybrids = pareto.measured()
    if hybrids:
        plots.save(pareto.picture(hybrids), FIGURES / "pareto.svg")
    layers = PiConfig(num_hidden_layers=6, num_attention_heads=8).patterns()
    write_explorer(DOCS / "explorer.html", layers, heads=8, context=8192)
    plots.save(plots.growth_picture(fields(32768)), FIGURES / "growth.svg")
    plots.save(plots.hops_picture(fields(8192)), FIGURES / "hops.svg")
    plots.save(labelled_pattern(), FIGURES / "window_and_skips.svg")
    shown = coordinated_heads(window=6, skips=6, heads=4, sinks=2)  # small enough to count its tiles
    plots.save(plots.pattern_picture(shown, 38), FIGURES / "pattern.svg")
    plots.save(plots.density_picture(ONE_LAYER, 2048), FIGURES / "density.svg")
    sizes = PiConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, vocab_size=50257, gate=True).sizes()
    patterns = {"π": PiPattern(256, 256, 16), "ring-local": PiPattern(272, 1, 0)}
    lengths = [2**power for power in range(9, 18)]
    plots.save(plots.flops_picture(patterns, sizes, lengths), FIGURES / "flops.svg")
    picture = plots.curves(volumes(), "tokens of the sequence", "received a layer (MiB)", log=True)
    plots.save(picture, FIGURES / "volumes.svg")
    picture = plots.curves(times_of_pieces(), "tokens of the sequence", "forward + backward (ms)", log=True)
    plots.save(picture, FIGURES / "multigpu.svg")
    for file in sorted(RESULTS.glob("gpu-*.json")):
        lines = times_of_kernels(json.loads(file.read_text()))
        picture = plots.curves(lines, "tokens of the sequence", "forward + backward (ms)", log=True)
        plots.save(picture, FIGURES / f"{file.stem}.svg")
