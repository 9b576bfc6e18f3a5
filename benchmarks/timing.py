"""Medians, machine description and result files that all benchmarks share."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def median_seconds(run: Callable[[], Any], *, budget: float = 3.0, most: int = 15, least: int = 3) -> float:
    """Median time of `run` after one warm-up call, over at most `most` calls or about `budget` seconds."""
    run()
    times: list[float] = []
    while len(times) < least or (sum(times) < budget and len(times) < most):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def machine() -> dict[str, str | int]:
    """Processor, threads and versions, for the head of a result file."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def write(name: str, result: dict[str, Any]) -> Path:
    """Write a result file with the machine's description; the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(in_lines({"machine": machine()} | result))
    return path


def in_lines(result: dict[str, Any]) -> str:
    """A result as JSON in which each row stands on a line of its own."""

    def value(found: Any) -> str:
        if isinstance(found, list) and found and isinstance(found[0], dict):
            return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in found) + "\n ]"
        return json.dumps(found)

    return "{\n" + ",\n".join(f" {json.dumps(name)}: {value(found)}" for name, found in result.items()) + "\n}\n"
