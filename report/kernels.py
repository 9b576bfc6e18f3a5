"""Tables of the operator, of a decoded token and of a training step, on one device."""

from __future__ import annotations

from report.markdown import Measured, described, per_file, read, table

KINDS = ("forward", "forward+backward")
"""What is timed, as the result files name it."""
WORDS = ("forward", "forward + backward")


def cpu() -> str:
    """Forward + backward of the blocked implementation beside dense attention."""
    kind = KINDS[1]
    rows = [
        [
            str(row["S"]),
            f"{row[f'pi blocked {kind} ms']:.0f} ms",
            f"{row[f'sdpa causal {kind} ms']:.0f} ms",
            f"{row[f'speed-up over sdpa causal, {kind}']:.1f}×",
        ]
        for row in read("cpu")["operator"]
    ]
    return table(["S", "π-Attention", "causal SDPA", "faster"], rows)


def _gpu(result: Measured) -> str:
    rows = []
    first = list(dict.fromkeys(row["pattern"] for row in result["rows"]))
    for row in sorted(result["rows"], key=lambda row: (first.index(row["pattern"]), -row["D"], row["S"])):
        cells = [row["pattern"], str(row["D"]), f"{row['S']:,}"]
        for kind in KINDS:
            measured = f"{kind} in graph us" if f"{kind} in graph us" in row["pi"] else f"{kind} us"
            dense = row.get("sdpa causal")
            cells += [f"{row['pi'][measured]:,.0f}", f"{row['pi'][measured] / row[f'floor {kind} us']:.1f}"]
            cells.append(f"{dense[measured] / row['pi'][measured]:.1f}×" if dense else "–")
        called = row["pi"].get("forward+backward from Python us", row["pi"]["forward+backward us"])
        rows.append([*cells, f"{called:,.0f}"])
    head = ["w, π, m", "D", "S"]
    for kind in WORDS:
        head += [f"{kind}, µs", "over floor", "faster than causal SDPA"]
    said = (
        f"{described(result)}; B=1, H={result['H']}, bf16; measured ceilings {result['copy bytes/s'] / 1e12:.2f} "
        f"TB/s and {result['matrix flop/s'] / 1e12:.0f} TFLOP/s. Rows up to S = 8192 are replayed CUDA graphs; the "
        "last column is forward + backward called from Python, which the host bounds there."
    )
    return said + "\n\n" + table([*head, "from Python, µs"], rows)


def gpu() -> str:
    """The kernels beside their floor and dense attention, one table a GPU; in a CUDA graph where it was measured."""
    return per_file("gpu-*", _gpu)


def _peers(result: Measured) -> str:
    rows = []
    for row in (row for row in result["rows"] if "flex pair" in row):
        for name, times in row.items():
            if isinstance(times, dict):
                cells = [str(row["D"]), "π-Attention" if name == "pi" else name]
                for kind in KINDS:
                    time = times[f"{kind} us"]
                    cells += [f"{time:,.0f}", f"{time / row['pi'][f'{kind} us']:.2f}×"]
                rows.append([*cells, f"{times['peak MiB']:,.0f}"])
    head = ["D", "kernel", "forward, µs", "of ours", "forward + backward, µs", "of ours", "peak MiB"]
    return f"{described(result)}; S = 32768, w, π, m = 256, 256, 16.\n\n" + table(head, rows) if rows else ""


def peers() -> str:
    """What users would otherwise take, at one size, as a multiple of ours."""
    return per_file("gpu-*", _peers)


def _variants(result: Measured) -> str:
    rows = []
    for row in result["variants"]:
        cells = [row["name"]]
        for kind in KINDS:
            share = result["variants"][0][f"{kind} over floor"] / row[f"{kind} over floor"]
            cells += [f"{row['pi'][f'{kind} us']:,.0f}", f"{row[f'{kind} over floor']:.1f}", f"{share:.0%}"]
        rows.append(cells)
    head = ["at S = 32768, D = 128"]
    for kind in WORDS:
        head += [f"{kind}, µs", "over its floor", "of the causal row's share"]
    return f"{described(result)}.\n\n" + table(head, rows) if rows else ""


def variants() -> str:
    """Bidirectional, grouped, packed and per-head rows with their own floors."""
    return per_file("gpu-*", _variants)


def _coordinated(result: Measured) -> str:
    rows = []
    for row in result["rows"]:
        cells = [row["pattern"], str(row["D"]), str(row["key heads"])]
        for kind in KINDS:
            ours = row["pi"][f"{kind} us"]
            others = (row[name][f"{kind} us"] for name in ("without phases", "our window of as many keys"))
            cells += [f"{ours:,.0f}", *(f"{ours / other:.2f}×" for other in others)]
        rows.append(cells)
    head = ["w, π, m", "D", "key heads"]
    for kind in WORDS:
        head += [f"{kind}, µs", "of no phases", "of a window of as many keys"]
    return f"{described(result)}; S = 32768, H={result['H']}, bf16.\n\n" + table(head, rows)


def coordinated() -> str:
    """Heads with all phases of a period, beside no phases and a window of as many keys."""
    return per_file("coordinated-*", _coordinated)


def _host(result: Measured) -> str:
    kinds = [f"{name} {kind} us" for kind in KINDS for name in ("pi", "sdpa causal")]
    rows = [[f"{row['S']:,}", *(f"{row[kind]:,.0f}" for kind in kinds)] for row in result["rows"]]
    head = ["S", "π forward, µs", "SDPA forward", "π forward + backward", "SDPA forward + backward"]
    return f"{described(result)}; H={result['H']}, D=128, bf16.\n\n" + table(head, rows)


def host() -> str:
    """An eager call at short lengths, from Python to the end of its kernels."""
    return per_file("host-*", _host)


def _decode(result: Measured) -> str:
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
    sizes = f"H={result['H']}, D={result['D']}, bf16, {result['pattern']}"
    return f"{described(result)}; {sizes}; one layer's operator.\n\n" + table(head, rows)


def decode() -> str:
    """A decoded token beside dense attention."""
    return per_file("decode-*", _decode)


def _step(result: Measured) -> str:
    found = {(row["S"], row["variant"]): row for row in result["rows"]}
    rows = []
    for length in sorted({length for length, _ in found}):
        ours, local, dense = (found[length, variant] for variant in ("pi", "ring-local", "dense"))
        times = [f"{row['step ms']:,.0f}" for row in (ours, local, dense)]
        over_local, of_dense = ours["step ms"] / local["step ms"], dense["step ms"] / ours["step ms"]
        peaks = ", ".join(f"{row['peak GiB']:.0f}" for row in (ours, local, dense))
        shares = [f"{over_local:.2f}×", f"{of_dense:.2f}×", f"{ours['tokens/s']:,.0f}"]
        rows.append([f"{length:,}", *times, *shares, peaks])
    times = ["π, ms", "ring-local, ms", "dense, ms"]
    head = ["S", *times, "π over ring-local", "dense over π", "π tokens/s", "peak GiB"]
    return f"{described(result)}; {result['tokens']:,} tokens a step.\n\n" + table(head, rows)


def step() -> str:
    """Training steps of a model, by variant."""
    return per_file("step-*", _step)
