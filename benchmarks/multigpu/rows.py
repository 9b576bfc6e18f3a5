"""The result file: one JSON row a line, written as soon as it is known, so that a killed call loses nothing."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pi_attention.json_lines import append_json_line, read_json_lines

Row = dict[str, Any]

OUT_OF_MEMORY = "out of memory"
FILE = Path(__file__).parents[1] / "results" / "multigpu.jsonl"
"""Rows that are kept."""


@dataclass(frozen=True)
class Machine:
    """What runs the cases.

    Args:
        name: of its GPUs, or "CPU".
        gpus: how many there are; processes of a dry run.
        memory: bytes of one.
    """

    name: str
    gpus: int
    memory: int

    @staticmethod
    def found() -> Machine:
        """The GPUs of this host, without a CUDA context.

        Raises:
            SystemExit: there is no GPU.
        """
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"no GPU was found ({error}): add --dry for toy sizes on CPUs.") from error
        name, memory = said[0].rsplit(", ", 1)
        return Machine(name, len(said), int(memory) << 20)

    def versions(self) -> dict[str, str]:
        """Versions and the day, for every row."""
        found = {"gpu": self.name, "python": platform.python_version()}
        for package in ("torch", "triton"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "none"
        return found | {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M")}


def read(path: Path) -> list[Row]:
    """Rows of a file; none where it is missing."""
    return [row for _, row in read_json_lines(path)]


class Rows:
    """Rows on disk, and whether a case has been measured on this kind of GPU.

    Args:
        out: file that rows are added to.
        before: files of earlier calls, whose cases are not measured again.
        machine: that measures.
    """

    def __init__(self, out: Path, before: Sequence[Path], machine: Machine) -> None:
        self.out, self.machine = out, machine
        paths = {path.resolve() for path in (out, *before)}
        self.known = [row for path in sorted(paths) for row in read(path) if row["gpu"] == machine.name]

    def of(self, settings: Row) -> Row | None:
        """The row of these settings, if they have been measured, or do not fit."""
        final = (row for row in self.known if row.get("failed") in (None, OUT_OF_MEMORY))
        return next((row for row in final if settings.items() <= row.items()), None)

    def add(self, row: Row) -> None:
        """Write a row at once, and say it."""
        row = self.machine.versions() | row
        self.known.append(row)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        append_json_line(self.out, row)
        said = {name: value for name, value in row.items() if name not in self.machine.versions()}
        print(json.dumps(said, ensure_ascii=False), flush=True)
