"""Tables in Markdown, and what is said of each result file of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from benchmarks.timing import RESULTS

Measured = dict[str, Any]
"""What a result file holds."""
NOTHING = "Not measured yet."


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read(name: str) -> Measured:
    """One result file of the benchmarks."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def per_file(names: str, told: Callable[[Measured], str]) -> str:
    """What is told of each result file whose name fits, one below the other; a file may have nothing to tell."""
    parts = [told(json.loads(file.read_text())) for file in sorted(RESULTS.glob(f"{names}.json"))]
    return "\n\n".join(part for part in parts if part) or NOTHING


def version(result: Measured) -> str:
    """Version of torch, and the day."""
    return f"torch {result['machine']['torch']}, {result['machine']['date']}"


def described(result: Measured) -> str:
    """The GPU, the version of torch, and the day."""
    return f"{result['gpu']}, {version(result)}"
