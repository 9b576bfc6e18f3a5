"""Write the tables and pictures of README.md and docs/ from the result files: `python -m benchmarks.report`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experiments.report
from benchmarks.timing import RESULTS
from pi_attention.pattern import PiPattern

ROOT = RESULTS.parents[1]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cpu() -> str:
    """Forward + backward of the blocked implementation beside dense attention."""
    result = json.loads((RESULTS / "cpu.json").read_text())
    kind = "forward+backward"
    rows = [
        [
            str(row["S"]),
            f"{row[f'pi blocked {kind} ms']:.0f} ms",
            f"{row[f'sdpa causal {kind} ms']:.0f} ms",
            f"{row[f'speed-up over sdpa causal, {kind}']:.1f}×",
        ]
        for row in result["operator"]
    ]
    return table(["S", "π-Attention", "causal SDPA", "faster"], rows)


def _described(result: dict[str, Any]) -> str:
    return f"{result['gpu']}, torch {result['machine']['torch']}, {result['machine']['date']}"


def gpu() -> str:
    """The kernels beside their floor and dense attention, one table a GPU; in a CUDA graph where it was measured."""
    parts = []
    for file in sorted(RESULTS.glob("gpu-*.json")):
        result = json.loads(file.read_text())
        rows = []
        for row in result["rows"]:
            cells = [row["pattern"], str(row["D"]), f"{row['S']:,}"]
            for kind in ("forward", "forward+backward"):
                measured = f"{kind} in graph us" if f"{kind} in graph us" in row["pi"] else f"{kind} us"
                dense = row.get("sdpa causal")
                cells += [f"{row['pi'][measured]:,.0f}", f"{row['pi'][measured] / row[f'floor {kind} us']:.1f}"]
                cells.append(f"{dense[measured] / row['pi'][measured]:.1f}×" if dense else "–")
            rows.append([*cells, f"{row['pi']['forward+backward us']:,.0f}"])
        head = ["w, π, m", "D", "S"]
        for kind in ("forward", "forward + backward"):
            head += [f"{kind}, µs", "over floor", "faster than causal SDPA"]
        described = (
            f"{_described(result)}; B=1, H={result['H']}, bf16; measured ceilings {result['copy bytes/s'] / 1e12:.2f} "
            f"TB/s and {result['matrix flop/s'] / 1e12:.0f} TFLOP/s. Rows up to S = 8192 are replayed CUDA graphs; the "
            "last column is forward + backward called from Python, which the host bounds there."
        )
        parts.append(described + "\n\n" + table([*head, "from Python, µs"], rows))
    return "\n\n".join(parts) or "Not measured yet."


def peers() -> str:
    """What users would otherwise take, at one size, as a multiple of ours."""
    parts = []
    for file in sorted(RESULTS.glob("gpu-*.json")):
        result = json.loads(file.read_text())
        rows = []
        for row in (row for row in result["rows"] if "flex pair" in row):
            for name, times in row.items():
                if isinstance(times, dict):
                    cells = [str(row["D"]), "π-Attention" if name == "pi" else name]
                    for kind in ("forward", "forward+backward"):
                        cells += [
                            f"{times[f'{kind} us']:,.0f}",
                            f"{times[f'{kind} us'] / row['pi'][f'{kind} us']:.2f}×",
                        ]
                    rows.append([*cells, f"{times['peak MiB']:,.0f}"])
        if rows:
            head = ["D", "kernel", "forward, µs", "of ours", "forward + backward, µs", "of ours", "peak MiB"]
            parts.append(f"{_described(result)}; S = 32768, w, π, m = 256, 256, 16.\n\n" + table(head, rows))
    return "\n\n".join(parts) or "Not measured yet."


def variants() -> str:
    """Bidirectional, grouped, packed and per-head rows with their own floors."""
    parts = []
    for file in sorted(RESULTS.glob("gpu-*.json")):
        result = json.loads(file.read_text())
        rows = []
        for row in result["variants"]:
            cells = [row["name"]]
            for kind in ("forward", "forward+backward"):
                share = result["variants"][0][f"{kind} over floor"] / row[f"{kind} over floor"]
                cells += [f"{row['pi'][f'{kind} us']:,.0f}", f"{row[f'{kind} over floor']:.1f}", f"{share:.0%}"]
            rows.append(cells)
        head = ["at S = 32768, D = 128"]
        for kind in ("forward", "forward + backward"):
            head += [f"{kind}, µs", "over its floor", "of the causal row's share"]
        if rows:
            parts.append(f"{_described(result)}.\n\n" + table(head, rows))
    return "\n\n".join(parts) or "Not measured yet."


def coordinated() -> str:
    """Heads with all phases of a period, beside no phases and a window of as many keys."""
    parts = []
    for file in sorted(RESULTS.glob("coordinated-*.json")):
        result = json.loads(file.read_text())
        rows = []
        for row in result["rows"]:
            cells = [row["pattern"], str(row["D"]), str(row["key heads"])]
            for kind in ("forward us", "forward+backward us"):
                ours = row["pi"][kind]
                others = (row[name][kind] for name in ("without phases", "our window of as many keys"))
                cells += [f"{ours:,.0f}", *(f"{ours / other:.2f}×" for other in others)]
            rows.append(cells)
        head = ["w, π, m", "D", "key heads"]
        for kind in ("forward", "forward + backward"):
            head += [f"{kind}, µs", "of no phases", "of a window of as many keys"]
        parts.append(f"{_described(result)}; S = 32768, H={result['H']}, bf16.\n\n" + table(head, rows))
    return "\n\n".join(parts) or "Not measured yet."


def host() -> str:
    """An eager call at short lengths, from Python to the end of its kernels."""
    parts = []
    for file in sorted(RESULTS.glob("host-*.json")):
        result = json.loads(file.read_text())
        kinds = ("pi forward us", "sdpa causal forward us", "pi forward+backward us", "sdpa causal forward+backward us")
        rows = [[f"{row['S']:,}", *(f"{row[kind]:,.0f}" for kind in kinds)] for row in result["rows"]]
        head = ["S", "π forward, µs", "SDPA forward", "π forward + backward", "SDPA forward + backward"]
        parts.append(f"{_described(result)}; H={result['H']}, D=128, bf16.\n\n" + table(head, rows))
    return "\n\n".join(parts) or "Not measured yet."


def decode() -> str:
    """A decoded token beside dense attention."""
    parts = []
    for file in sorted(RESULTS.glob("decode-*.json")):
        result = json.loads(file.read_text())
        rows = []
        for row in result["rows"]:
            ours, dense = row["pi"], row.get("dense")
            cells = [str(row["B"]), f"{row['context']:,}", f"{ours['graph us']:.1f}", f"{ours['eager us']:.0f}"]
            cells.append(f"{ours['cache bytes'] / 2**20:,.0f} MiB")
            if dense:
                cells += [f"{dense['graph us']:,.1f}", f"{dense['cache bytes'] / 2**20:,.0f} MiB"]
                cells += [f"{row['faster, in graph']:.1f}×", f"{row['faster, eager']:.1f}×"]
            rows.append(cells + ["–"] * (9 - len(cells)))
        head = ["B", "context", "π, µs", "from Python", "cache", "dense SDPA, µs", "cache", "faster", "from Python"]
        described = (
            f"{_described(result)}; H={result['H']}, D={result['D']}, bf16, {result['pattern']}; one layer's operator."
        )
        parts.append(described + "\n\n" + table(head, rows))
    return "\n\n".join(parts) or "Not measured yet."


def step() -> str:
    """Training steps of a model, by variant."""
    parts = []
    for file in sorted(RESULTS.glob("step-*.json")):
        result = json.loads(file.read_text())
        found = {(row["S"], row["variant"]): row for row in result["rows"]}
        rows = []
        for length in sorted({length for length, _ in found}):
            ours, local, dense = (found[length, variant] for variant in ("pi", "ring-local", "dense"))
            rows.append(
                [
                    f"{length:,}",
                    *(f"{row['step ms']:,.0f}" for row in (ours, local, dense)),
                    f"{ours['step ms'] / local['step ms']:.2f}×",
                    f"{dense['step ms'] / ours['step ms']:.2f}×",
                    f"{ours['tokens/s']:,.0f}",
                    f"{ours['peak GiB']:.0f}, {local['peak GiB']:.0f}, {dense['peak GiB']:.0f}",
                ]
            )
        head = [
            "S",
            "π, ms",
            "ring-local, ms",
            "dense, ms",
            "π over ring-local",
            "dense over π",
            "π tokens/s",
            "peak GiB",
        ]
        described = f"{_described(result)}; {result['tokens']:,} tokens a step."
        parts.append(described + "\n\n" + table(head, rows))
    return "\n\n".join(parts) or "Not measured yet."


def conversion() -> str:
    """Perplexity of converted pretrained models."""
    parts = []
    for file in sorted(RESULTS.glob("conversion-*.json")):
        result = json.loads(file.read_text())
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
        machine = result["machine"]
        device = result.get("device", "CPU, fp32")
        described = f"{result['model']}, {result['text']}; {device}, torch {machine['torch']}, {machine['date']}"
        head = ["context", "attention", "trained", "perplexity", "over dense (95 %)", "chunks"]
        parts.append(described + ".\n\n" + table(head, rows))
    return "\n\n".join(parts) or "Not measured yet."


def streaming() -> str:
    """Perplexity while a long text streams through a bounded cache."""
    parts = []
    for file in sorted(RESULTS.glob("streaming-*.json")):
        result = json.loads(file.read_text())
        found = result["streaming"]
        head = ["tokens", *(f"{row['variant']}, trained: {row['trained']}" for row in found)]
        starts = [*found[0]["first position"][1:], result["tokens"]]
        rows = [
            [f"{first:,} to {end:,}", *(f"{row['perplexity'][i]:.2f}" for row in found)]
            for i, (first, end) in enumerate(zip(found[0]["first position"], starts, strict=True))
        ]
        rows.append(["cache", *(f"{row['cache bytes'] / 2**20:,.0f} MiB" for row in found)])
        machine = result["machine"]
        described = (
            f"{result['model']}, {result['text']}; {result['device']}, torch {machine['torch']}, {machine['date']}"
        )
        parts.append(described + ".\n\n" + table(head, rows))
    return "\n\n".join(parts) or "Not measured yet."


def speed() -> str:
    """Prefill and decoding of a converted model beside the dense original."""
    parts = []
    for file in sorted(RESULTS.glob("speed-*.json")):
        result = json.loads(file.read_text())
        by_context: dict[int, list[dict[str, Any]]] = {}
        for row in result["speed"]:
            by_context.setdefault(row["context"], []).append(row)
        rows = []
        for context, (dense, ours) in by_context.items():
            cells = [f"{context:,}"]
            for kind in ("prefill tokens/s", "decode tokens/s"):
                cells += [f"{dense[kind]:,.0f}", f"{ours[kind]:,.0f}", f"{ours[kind] / dense[kind]:.2f}×"]
            rows.append(cells)
        machine = result["machine"]
        described = f"{result['model']}; {result['device']}, batch 1, bf16, torch {machine['torch']}, {machine['date']}"
        head = ["context", "prefill, dense", "converted", "", "decode, dense", "converted", ""]
        parts.append(described + "; tokens a second.\n\n" + table(head, rows))
    return "\n\n".join(parts) or "Not measured yet."


def memory() -> str:
    """What a rank allocates in a training step, by layout, as tracked on fake ranks."""
    kinds = {
        "tracked bytes": "tracked a rank",
        "bill bytes": "the bill's",
        "tracked bytes, loss by slices": "tracked, loss by slices",
    }
    rows = [
        [row["model"].upper(), str(row["ranks"]), row["layout"], str(row["zero"])]
        + [f"{row[kind] / 2**30:.0f} GiB" if kind in row else "–" for kind in kinds]
        for row in json.loads((RESULTS / "memory.json").read_text())["rows"]
    ]
    return table(["model", "ranks", "layout", "ZeRO", *kinds.values()], rows)


def multigpu() -> str:
    """The halo exchange beside an all-gather and dense Ring Attention on several GPUs, and a training step."""
    parts = []
    for file in sorted(RESULTS.glob("multigpu-*.json")):
        result = json.loads(file.read_text())
        rows = []
        for row in result["operator"]:
            cells = [f"{row['S']:,}", f"{row['halo rows']:,}"]
            for kind in ("no exchange", "halo", "all-gather", "dense ring"):
                found = row.get(kind)
                cells.append(f"{found['ms']:.1f} ms, {found['peak MiB'] / 1024:.1f} GiB" if found else "–")
            rows.append(cells)
        head = ["tokens in all", "halo, rows a rank", "no exchange", "halo", "all-gather", "dense Ring Attention"]
        errors = ", ".join(f"{kind} {error:.1e}" for kind, error in result["largest relative error"].items())
        machine = result["machine"]
        described = (
            f"{result['ranks']} × {result['device']}, torch {machine['torch']}, {machine['date']}; w, π, m = "
            f"{result['pattern']}, H = {result['H']}, D = {result['D']}, bf16; forward + backward of the operator. "
            f"Checked before against one GPU, largest relative error of outputs and gradients: {errors}."
        )
        parts.append(described + "\n\n" + table(head, rows))
        steps = [
            [f"{r['S']:,}", f"{r['seconds']:.2f} s", f"{r['tokens/s']:,.0f}", f"{r['peak GiB']:.1f} GiB"]
            for r in result["training step"]
        ]
        count = result["training step"][0]["parameters"] / 1e9
        parts.append(
            f"A training step (forward, backward, AdamW) of {count:.2f} B parameters on the same GPUs, FSDP2 and "
            "context parallelism over both, activations recomputed:\n\n"
            + table(["tokens of the sequence", "a step", "tokens/s", "peak a GPU"], steps)
        )
    return "\n\n".join(parts) or "Not measured yet."


def coverage() -> str:
    """Exact receptive fields of the examples."""
    from benchmarks.theory import PATTERNS, fields

    rows = []
    for name, field in fields(32768).items():
        periods = _spelled(PATTERNS[name])
        cells = [f"{field.covered(n):,}; {field.reach(n):,}" for n in (1, 2, 4, 8)]
        hops = field.layers_to_cover()
        rows.append([name, periods, *cells, "more than 8" if hops is None else str(hops)])
    return table(["", "periods", "1 layer", "2", "4", "8 layers", "layers to see everything"], rows)


def _spelled(pattern: PiPattern) -> str:
    """The periods of a pattern, and its phases if there are any."""
    if not pattern.skips:
        return "–"
    periods = ", ".join(map(str, dict.fromkeys(pattern.periods)))
    return periods + (f"; phases {', '.join(map(str, pattern.phases))}" if any(pattern.phases) else "")


def one_layer() -> str:
    """What the heads see together in one layer, how many keys a lag has, and what layers cover."""
    result = json.loads((RESULTS / "one_layer.json").read_text())
    context, edges = result["context"], result["edges"]
    rows = []
    for row in result["rows"]:
        hops = row["layers to see everything"]
        cells = [f"{row[kind]:,}" for kind in ("stretch", "holes", "reach")]
        cells += [f"{share:.3f}" if share else "0" for share in row["density"]]
        cells.append(f"more than {result['layers at most']}" if hops is None else str(hops))
        rows.append([row["name"], _spelled(PiPattern.from_dict(row["pattern"])), *cells])
    ranges = [f"{first:,} to {end - 1:,}" for first, end in zip(edges, [*edges[1:], context], strict=True)]
    head = ["", "periods", "stretch", "holes", "reach", *(f"keys at {lags}" for lags in ranges)]
    return table([*head, f"layers to see {context:,}"], rows)


def all_skips() -> str:
    """A layer of coordinated heads with all skips beside a dense one."""
    from pi_attention.accounting import attention_flops, decoding_keys, dense_flops, visible_pairs
    from pi_attention.pattern import coordinated_heads

    rows = []
    for period in (4, 8):
        pattern = coordinated_heads(16, None, period, period)
        for length in (2048, 32768, 1 << 20):
            share = attention_flops(pattern, length, heads=period, head_dim=64)
            share /= dense_flops(length, heads=period, head_dim=64)
            read = sum(decoding_keys(pattern, length))
            pairs = sum(visible_pairs(pattern, length))
            rows.append([str(period), f"{length:,}", f"{pairs:,}", f"{share:.2%}", f"{read:,}", f"{read / length:.2%}"])
    head = ["period", "context", "pairs of head 0", "products, of dense", "keys a decoded token reads", "of the cache"]
    return table(head, rows)


def influence() -> str:
    """The Jacobian of the last position by the layers that an input needs."""
    result = json.loads((RESULTS / "influence.json").read_text())
    networks = result["networks"]
    norms = [[row["median norm"] for row in network["by layers needed"]] for network in networks]
    rows = [
        [str(row["layers"]), f"{row['positions']:,}", *(f"{found[i]:.2g}" for found in norms)]
        for i, row in enumerate(networks[0]["by layers needed"])
    ]
    wrong = ", ".join(f"{network['weights']}: {network['contradictions']}" for network in networks)
    head = ["layers needed", "positions", *(f"median norm, {network['weights']} weights" for network in networks)]
    described = f"{result['pattern']}, {result['tokens']:,} tokens; positions that contradict the prediction: {wrong}."
    return described + "\n\n" + table(head, rows)


def saving() -> str:
    """Share of the forward operations of a dense model that π-attention saves."""
    from pi_attention.accounting import Sizes, saving_over_dense

    lengths = [1024, 2048, 4096, 8192, 16384, 32768, 131072]
    rows = []
    for name, hidden, layers, heads in (
        ("124 M", 768, 12, 12),
        ("1.3 B", 2048, 24, 16),
        ("7 B", 4096, 32, 32),
        ("70 B", 8192, 80, 64),
    ):
        inner = -(-8 * hidden // 3 // 32) * 32
        sizes = Sizes(hidden, inner, layers, heads, heads, hidden // heads, 50257, gate_features=hidden, gate_width=32)
        savings = [saving_over_dense(PiPattern(256, 256, 16), length, sizes) for length in lengths]
        rows.append([f"{name} ({layers} layers of {hidden})", *(f"{saving:.1%}" for saving in savings)])
    return table(["", *(f"S = {length:,}" for length in lengths)], rows)


def support() -> str:
    """What the tests of each version of transformers say."""
    results = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("support-*.json"))]
    if not results:
        return "Not measured yet."

    def cell(counts: dict[str, int]) -> str:
        words = {"passed": "tests passed", "skipped": "skipped", "failed": "**failed**"}
        return ", ".join(f"{counts[kind]} {word}" for kind, word in words.items() if kind in counts) or "–"

    rows = [[feature, *(cell(r["features"].get(feature, {})) for r in results)] for feature in results[-1]["features"]]
    return table(["", *(f"transformers {result['transformers']}" for result in results)], rows)


TABLES: dict[str, Callable[[], str]] = {
    "cpu": cpu,
    "gpu": gpu,
    "peers": peers,
    "variants": variants,
    "coordinated": coordinated,
    "host": host,
    "decode": decode,
    "step": step,
    "conversion": conversion,
    "streaming": streaming,
    "speed": speed,
    "memory": memory,
    "multigpu": multigpu,
    "support": support,
    "coverage": coverage,
    "one_layer": one_layer,
    "all_skips": all_skips,
    "influence": influence,
    "saving": saving,
    **experiments.report.TABLES,
}


def filled(text: str) -> str:
    """A page with each `<!-- benchmark NAME -->` … `<!-- end -->` filled in."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- benchmark {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- benchmark (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def pages() -> dict[Path, Any]:
    """The pages that may hold tables."""
    return {page: page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


def main() -> None:
    from benchmarks import figures

    figures.draw()
    for page, text in pages().items():
        page.write_text(filled(text))


if __name__ == "__main__":
    main()
