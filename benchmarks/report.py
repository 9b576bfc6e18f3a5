"""Write the tables of README.md and docs/ from the result files: `python -m benchmarks.report`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.timing import RESULTS

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


def gpu() -> str:
    """The kernels beside their floor and dense attention, one table a GPU."""
    parts = []
    for file in sorted(RESULTS.glob("gpu-*.json")):
        result = json.loads(file.read_text())
        rows = []
        for row in result["rows"]:
            cells = [row["pattern"], str(row["D"]), str(row["S"])]
            for kind in ("forward", "forward+backward"):
                cells += [f"{row['pi'][f'{kind} us']:,.0f}", f"{row[f'{kind} over floor']:.1f}"]
                dense = row.get("sdpa causal")
                cells.append(f"{dense[f'{kind} us'] / row['pi'][f'{kind} us']:.1f}×" if dense else "–")
            rows.append(cells)
        head = ["w, π, m", "D", "S"]
        for kind in ("forward", "forward + backward"):
            head += [f"{kind}, µs", "over floor", "faster than causal SDPA"]
        described = (
            f"{result['gpu']}, torch {result['machine']['torch']}, {result['machine']['date']}; "
            f"B=1, H={result['H']}, bf16; measured ceilings {result['copy bytes/s'] / 1e12:.2f} TB/s and "
            f"{result['matrix flop/s'] / 1e12:.0f} TFLOP/s."
        )
        parts.append(described + "\n\n" + table(head, rows))
    return "\n\n".join(parts) or "Not measured yet."


TABLES: dict[str, Callable[[], str]] = {"cpu": cpu, "gpu": gpu}


def filled(text: str) -> str:
    """A page with each `<!-- benchmark NAME -->` … `<!-- end -->` filled in."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- benchmark {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- benchmark (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def pages() -> dict[Path, Any]:
    """The pages that may hold tables."""
    return {page: page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


def main() -> None:
    for page, text in pages().items():
        page.write_text(filled(text))


if __name__ == "__main__":
    main()
