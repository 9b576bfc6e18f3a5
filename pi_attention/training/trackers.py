"""Where a run's figures go beside its folder: TensorBoard, Weights & Biases, Trackio or MLflow, by accelerate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

NONE = "none"
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", NONE)
PROJECT = "pi-attention"
"""Name of the project or experiment under which trackers file the runs."""


def check_trackers(names: Sequence[str]) -> None:
    """Check `report_to` before any work is done.

    Raises:
        ValueError: a name is unknown, its package is not installed, or "none" stands beside others.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"report_to={name!r} is no tracker: use one of {', '.join(TRACKERS)}.")
        if name != NONE and find_spec(name) is None:
            raise ValueError(f"report_to={name!r} needs the package {name}: pip install {name}, or leave it out.")
    if NONE in names and len(names) > 1:
        raise ValueError(f"report_to={' '.join(names)}: none stands alone, leave it or the others out.")


class Trackers:
    """The trackers of a run, of one rank.

    Args:
        names: of `TRACKERS`.
        run: the run's folder; TensorBoard's event files lie in `run/runs`, and its name is the run's.
        settings: of the run, by the part that they belong to, as `to_plain` makes them.
    """

    def __init__(self, names: Sequence[str], run: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
        check_trackers(names)
        flat = {f"{part}.{name}": value for part, values in settings.items() for name, value in values.items()}
        plain = {name: x if isinstance(x, int | float | str) else str(x) for name, x in flat.items()}
        self.trackers = [_made(name, run) for name in names if name != NONE]
        for tracker in self.trackers:
            if tracker.name != "tensorboard":  # which would begin another run for them
                tracker.store_init_configuration(plain)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Report figures of a step; names that begin with eval_ are of the validation."""
        tagged = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
            for name, value in values.items()
        }
        for tracker in self.trackers:
            tracker.log(tagged, step=step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for tracker in self.trackers:
            tracker.finish()


def _made(name: str, run: Path) -> Any:
    from accelerate import PartialState, tracking

    PartialState()  # the trackers' log asks it for the rank; a process group that is there stays
    title = run.resolve().name
    made: Any
    if name == "tensorboard":
        made = tracking.TensorBoardTracker("runs", str(run))
    elif name == "wandb":
        made = tracking.WandBTracker(PROJECT, name=title, dir=str(run))
    elif name == "trackio":
        made = tracking.TrackioTracker(PROJECT, name=title)
    else:
        made = tracking.MLflowTracker(PROJECT, run_name=title)
    made.main_process_only = False  # it is made on one rank alone
    if hasattr(made, "start"):  # not in older versions of accelerate, where they start when made
        made.start()
    return made
