"""Tables of several devices: what a rank allocates, and how the halo compares."""

from __future__ import annotations

from pi_attention import PiPattern
from pi_attention.bill import MODELS, WAYS, bill, fewest_ranks
from pi_attention.distributed import Layout
from report.markdown import Measured, per_file, read, table, version
from report.multigpu import tables


def memory() -> str:
    """What a rank allocates in a training step, by layout, as tracked on fake ranks."""
    result, rows = read("memory"), []
    pattern = PiPattern(*map(int, result["pattern"].split(", ")))
    for row in result["rows"]:
        cells = [row["model"].upper(), str(row["ranks"]), row["layout"], str(row["zero"])]
        layout = Layout.parse(row["layout"])
        for kind, size in (("tracked bytes", None), ("tracked bytes, loss by slices", result["loss slice"])):
            made = bill(
                *(MODELS[row["model"]], pattern, result["S"], layout.cp),
                loss_slice=size,
                dp=layout.dp,
                tp=layout.tp,
                zero=row["zero"],
            )
            cells += [f"{found / 2**30:.0f} GiB" for found in (row[kind], made.bytes)]
        rows.append(cells)
    return table(["model", "ranks", "layout", "ZeRO", "tracked", "bill", "tracked, loss by slices", "bill"], rows)


def eight() -> str:
    """What the bill says of long contexts on eight GPUs: memory, messages, and the fewest GPUs."""
    result, rows = read("memory"), []
    pattern = PiPattern(*map(int, result["pattern"].split(", ")))
    tracked = {(row["model"], row["S"]): row["tracked bytes, loss by slices"] for row in result["long"]}
    for model in ("1b", "8b"):
        for context in (1 << power for power in range(17, 23)):
            asked = MODELS[model], pattern, context
            bills = [bill(*asked, 8, way, result["loss slice"]) for way in WAYS]
            cells = [f"{made.bytes / 2**30:.0f} GiB" for made in bills]
            found = tracked.get((model, context))
            cells.insert(1, f"{found / 2**30:.0f} GiB" if found else "–")
            cells.append(" / ".join(f"{made.received / 2**30:.2f}" for made in bills) + " GiB")
            for memory in (80, 141):
                fewest = (fewest_ranks(*asked, memory << 30, way, result["loss slice"]) for way in WAYS)
                cells.append(" / ".join(map(str, fewest)))
            rows.append([model.upper(), f"{context:,}", *cells])
    head = ["model", "tokens in all", "halo", "halo, tracked", "all-gather", "dense ring"]
    return table([*head, "received a layer", "fewest of 80 GiB", "fewest of 141 GiB"], rows)


def _operator(result: Measured) -> str:
    rows = []
    for row in result["operator"]:
        cells = [f"{row['S']:,}", f"{row['halo rows']:,}"]
        for kind in ("no exchange", "halo", "all-gather", "dense ring"):
            found = row.get(kind)
            cells.append(f"{found['ms']:.1f} ms, {found['peak MiB'] / 1024:.1f} GiB" if found else "–")
        rows.append(cells)
    head = ["tokens in all", "halo, tokens a GPU", "no exchange", "halo", "all-gather", "dense Ring Attention"]
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
    return tables(table)
