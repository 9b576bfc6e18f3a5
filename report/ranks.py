"""Tables of several devices: what a rank allocates, and how the halo compares."""

from __future__ import annotations

from pi_attention import PiPattern
from pi_attention.bill import MODELS, WAYS, bill, fewest_ranks
from pi_attention.distributed import Layout
from report.markdown import read, table
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


def pieces() -> str:
    """What `python -m benchmarks.multigpu` has measured so far, piece by piece."""
    return tables(table)
