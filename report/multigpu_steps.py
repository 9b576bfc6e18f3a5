"""Tables of training steps on several GPUs: layouts beside the bill, contexts that fit, tokens/s."""

from __future__ import annotations

from benchmarks.multigpu.rows import Row
from benchmarks.multigpu.step import predicted
from benchmarks.multigpu.ways import GATHER, HALO, RING
from report.multigpu_rows import LABELS, NONE, Table, found, model_name, shared, values

OFF = 0.1
"""Share of a measured peak by which the bill may be off unflagged."""


def layouts(table: Table, rows: list[Row]) -> str:
    """Every step beside the bill of today, not of the day of the measurement."""
    body, off = [], 0
    steps = [row for row in rows if row["piece"] == "step" and row.get("peak GiB")]
    for row in sorted(steps, key=lambda row: (row["parameters"], row["ranks"], row["S"])):
        size = f"{row['parameters'] / 1e9:.1f} B" + (f", {row['layers']} layers" if row["layers"] else "")
        sliced = "whole" if row["loss slice"] is None else f"{row['loss slice']:,}"
        way = LABELS[row["way"]] + ("" if row["pattern"] == "one period" else f", {row['pattern']}")
        way += ", without its products" if row["hollow"] else ""
        bill = predicted(row) / 2**30
        ratio = bill / row["peak GiB"]
        flagged = abs(ratio - 1) > OFF
        off += flagged
        speed = f"{row['tokens/s']:,.0f}" if "tokens/s" in row else NONE
        exposed = NONE
        if "without messages s" in row:
            exposed = f"{max(0.0, 1 - row['without messages s'] / row['seconds']):.0%}"
        figures = [speed, exposed, f"{row['peak GiB']:.1f} GiB", f"{bill:.1f} GiB", f"{ratio:.2f}"]
        figures[-1] = f"**{figures[-1]}**" if flagged else figures[-1]
        body.append([size, row["layout"], str(row["zero"]), f"{row['S']:,}", way, sliced, *figures])
    head = ["model", "layout", "ZeRO", "tokens of a sequence", "keys by", "loss", "tokens/s", "exposed"]
    head += ["peak", "bill", "ratio"]
    caption = (
        'Training steps beside the bill. "Keys by" is how the keys of other GPUs arrive. "Loss" is how many tokens '
        'have logits at once.\n"Exposed" is the share of the time that messages take beyond what overlaps.'
    )
    caption += f" The bill is off by more than {OFF:.0%} in {off} rows, in bold." if off else ""
    return f"{caption}\n\n{table(head, body)}" if body else ""


def _longest(steps: list[Row], way: str, ranks: int) -> tuple[int, bool]:
    """The longest sequence of a step that fitted, and whether a longer one did not."""
    asked = {"ranks": ranks, "way": HALO if ranks == 1 and way == GATHER else way}
    tried = [row for row in steps if asked.items() <= row.items()]
    fits = max((row["S"] for row in tried if "failed" not in row), default=0)
    return fits, any("failed" in row and row["S"] > fits for row in tried)


def _fewest(counts: list[int], enough: list[int]) -> str:
    """The least number of GPUs that is enough; at most that many, where half as many were not tried."""
    if not enough:
        return NONE
    least = min(enough)
    return str(least) if least == 1 or least // 2 in counts else f"≤ {least}"


def contexts(table: Table, rows: list[Row]) -> str:
    """The longest sequence on each number of GPUs, and the fewest GPUs for a sequence, of each model."""
    return "\n\n".join(filter(None, (_contexts(table, rows, model) for model in values(rows, "model", piece="step"))))


def _contexts(table: Table, rows: list[Row], model: str) -> str:
    steps = shared(rows, model)
    counts = values(steps, "ranks", way=HALO)
    each_way = {way: {ranks: _longest(steps, way, ranks) for ranks in counts} for way in LABELS}
    if not any(bounded for of_way in each_way.values() for _, bounded in of_way.values()):
        return ""
    longest = [
        [
            LABELS[way],
            *((f"{fits:,}" if bounded else f"≥ {fits:,}") if fits else NONE for fits, bounded in each.values()),
        ]
        for way, each in each_way.items()
    ]
    lengths = sorted({fits for each in each_way.values() for fits, _ in each.values() if fits})
    fewest = [
        [f"{length:,}"]
        + [
            _fewest([n for n, at in each.items() if any(at)], [n for n, (fits, _) in each.items() if fits >= length])
            for each in each_way.values()
        ]
        for length in lengths
    ]
    return (
        f"The longest sequence, a power of two, of a training step of {model_name(model)} parameters that fits, by "
        "GPUs (loss by slices; dense beyond 131,072 tokens without its products):\n\n"
        + table(["", *map(str, counts)], longest)
        + "\n\nThe fewest GPUs for a context:\n\n"
        + table(["tokens", *LABELS.values()], fewest)
    )


def throughput(table: Table, rows: list[Row]) -> str:
    """Tokens/s by way and GPUs, of each model; and the fewest GPUs that are as fast as the largest dense ring."""
    return "\n\n".join(filter(None, (_throughput(table, rows, model) for model in values(rows, "model", piece="step"))))


def _throughput(table: Table, rows: list[Row], model: str) -> str:
    steps = [row for row in shared(rows, model) if "tokens/s" in row]
    counts, body = values(steps, "ranks"), []
    for length in values(steps, "S"):
        at = {way: {ranks: found(steps, S=length, way=way, ranks=ranks) for ranks in counts} for way in LABELS}
        if 1 in counts and any(at[GATHER].values()):
            at[GATHER][1] = at[HALO][1]  # one GPU has all keys
        speeds = {way: {n: row["tokens/s"] for n, row in each.items() if row} for way, each in at.items()}
        goal = max(speeds[RING].values(), default=None)
        for way, each in ((way, each) for way, each in speeds.items() if each):
            enough = [n for n, speed in each.items() if goal is not None and speed >= goal]
            cells = [f"{each[n]:,.0f}" if n in each else NONE for n in counts]
            body.append([f"{length:,}", LABELS[way], *cells, _fewest(list(each), enough)])
    if not body:
        return ""
    head = ["tokens", "", *(str(n) if n > 1 else "1 GPU" for n in counts), "fewest that reach the dense ring's best"]
    return f"Tokens/s of a training step of {model_name(model)} parameters:\n\n{table(head, body)}"
