"""Tables of several devices: what a rank allocates, and how the halo compares."""

from __future__ import annotations

from benchmarks import multigpu_tables
from report.markdown import Measured, per_file, read, table, version


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
        for row in read("memory")["rows"]
    ]
    return table(["model", "ranks", "layout", "ZeRO", *kinds.values()], rows)


def _operator(result: Measured) -> str:
    rows = []
    for row in result["operator"]:
        cells = [f"{row['S']:,}", f"{row['halo rows']:,}"]
        for kind in ("no exchange", "halo", "all-gather", "dense ring"):
            found = row.get(kind)
            cells.append(f"{found['ms']:.1f} ms, {found['peak MiB'] / 1024:.1f} GiB" if found else "–")
        rows.append(cells)
    head = ["tokens in all", "halo, rows a rank", "no exchange", "halo", "all-gather", "dense Ring Attention"]
    errors = ", ".join(f"{kind} {error:.1e}" for kind, error in result["largest relative error"].items())
    said = (
        f"{result['ranks']} × {result['device']}, {version(result)}; w, π, m = "
        f"{result['pattern']}, H = {result['H']}, D = {result['D']}, bf16; forward + backward of the operator. "
        f"Checked before against one GPU, largest relative error of outputs and gradients: {errors}."
    )
    return said + "\n\n" + table(head, rows)


def _training(result: Measured) -> str:
    rows = [
        [f"{r['S']:,}", f"{r['seconds']:.2f} s", f"{r['tokens/s']:,.0f}", f"{r['peak GiB']:.1f} GiB"]
        for r in result["training step"]
    ]
    count = result["training step"][0]["parameters"] / 1e9
    said = (
        f"A training step (forward, backward, AdamW) of {count:.2f} B parameters on the same GPUs, FSDP2 and "
        "context parallelism over both, activations recomputed:"
    )
    return said + "\n\n" + table(["tokens of the sequence", "a step", "tokens/s", "peak a GPU"], rows)


def multigpu() -> str:
    """The halo exchange beside an all-gather and dense Ring Attention on several GPUs, and a training step."""
    return per_file("multigpu-*", lambda result: _operator(result) + "\n\n" + _training(result))


def pieces() -> str:
    """What `python -m benchmarks.multigpu` has measured so far, piece by piece."""
    return multigpu_tables.tables(table)
