"""Rows of an experiment: each is a dict of settings with a result; finished rows are skipped, so a run resumes."""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 9: 2.262, 19: 2.093}
"""97.5 % quantiles of Student's t by degrees of freedom."""

Settings = dict[str, Any]


def load(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The finished rows of an experiment."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def run(
    name: str, rows: Iterable[Settings], measure: Callable[[Settings], dict[str, Any]], folder: Path = RESULTS
) -> list[dict[str, Any]]:
    """Measure every row that has no result yet; each is written, whole, before the next begins.

    Args:
        name: of the result file.
        rows: settings; two rows are the same when their settings are equal.
        measure: from settings to results.
        folder: of the result files.
    """
    folder.mkdir(exist_ok=True, parents=True)
    done = load(name, folder)
    for settings in rows:
        if any(row["settings"] == settings for row in done):
            continue
        begun = time.perf_counter()
        result = measure(settings)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        about = {"device": device, "torch": torch.__version__, "date": datetime.date.today().isoformat()}
        done.append({"settings": settings, "result": result, "seconds": time.perf_counter() - begun} | about)
        path = folder / f"{name}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"experiment": name, "rows": done}, indent=1) + "\n")
        part.replace(path)
        print(name, settings, result, flush=True)
    return done


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t) over seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("nan")
    return mean, T_975[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
