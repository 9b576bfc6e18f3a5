"""The pages that hold tables, and the tables by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from report import experiments, kernels, pretrained, ranks, serving, summary, theory

ROOT = Path(__file__).parents[1]
TABLES: dict[str, Callable[[], str]] = {
    "summary": summary.summary,
    "cpu": kernels.cpu,
    "gpu": kernels.gpu,
    "peers": kernels.peers,
    "variants": kernels.variants,
    "coordinated": kernels.coordinated,
    "host": kernels.host,
    "decode": kernels.decode,
    "step": kernels.step,
    "conversion": pretrained.conversion,
    "dense_layers": pretrained.dense_layers,
    "streaming": pretrained.streaming,
    "serving": serving.serving,
    "throughput": serving.throughput,
    "speed": pretrained.speed,
    "support": pretrained.support,
    "paged": serving.paged,
    "memory": ranks.memory,
    "eight": ranks.eight,
    "pieces": ranks.pieces,
    "coverage": theory.coverage,
    "one_layer": theory.one_layer,
    "all_skips": theory.all_skips,
    "influence": theory.influence,
    "saving": theory.saving,
    **experiments.TABLES,
}


def filled(text: str) -> str:
    """A page with each `<!-- benchmark NAME -->` … `<!-- end -->` filled in."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- benchmark {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- benchmark (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def pages() -> dict[Path, str]:
    """The pages that may hold tables, with their text."""
    return {page: page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
