"""Series without a period of their own: forecasting of events, prices and glucose, classification of appliances."""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as parquet
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import need, prepared
from experiments.experiment import Experiment, Result, Scale, Settings
from experiments.training import DEVICE, fit, products, segments
from experiments.variants import MAIN, config, specialise
from pi_attention.models import PiConfig, PiModel

FOLDER = "series"
Part = tuple[np.ndarray, np.ndarray]
"""Features [T, F] of a series and targets [T, O] that are known one step later."""


def _columns(path: Path) -> dict[str, list[str]]:
    need(path, "put the gzipped CSV file there")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    return {name: [row[name] for row in rows] for name in rows[0]}


def volatility(path: Path, column: str, form: str) -> list[Part]:
    """Daily log returns in percent, their size and the days since; to come: the logarithm of the size."""
    columns = _columns(path)
    quoted = zip(columns["Date"], columns[column], strict=True)
    kept = [(day, float(price)) for day, price in quoted if price not in ("", ".") and float(price) > 0]
    days = np.array([datetime.strptime(d, form).toordinal() for d, _ in kept], float)
    change = 100 * np.diff(np.log([price for _, price in kept]))
    size = np.log(np.abs(change) + 0.05)
    features = np.stack([change, size, np.log(np.diff(days))], axis=1)
    return [(features[:-1], size[1:, None])]


def glucose(path: Path) -> list[Part]:
    """Readings and the minutes since the last, which vary and have gaps; to come: the change to the next reading."""
    columns = _columns(path)
    times = [datetime.fromisoformat(t).timestamp() / 60 for t in columns["datetime"]]
    order = np.argsort(times, kind="stable")
    minutes, level = np.array(times)[order], np.array(columns["glucose"], float)[order]
    gap = np.log1p(np.diff(minutes, prepend=minutes[0]))
    change = np.diff(level, prepend=level[0])
    return [(np.stack([level, change, gap], axis=1)[:-1], change[1:, None])]


def flights(path: Path, airports: int = 20) -> list[Part]:
    """Departures of each of the busiest airports in order of time; to come: delay of the next, and the wait for it."""
    table = parquet.read_table(need(path, "take flights-3m.parquet of vega-datasets")).to_pydict()
    origin = np.array(table["origin"])
    names, counts = np.unique(origin, return_counts=True)
    minutes = np.array([t.timestamp() / 60 for t in table["date"]])
    delay = np.array(table["delay"], float)
    delay = np.sign(delay) * np.log1p(np.abs(delay))
    distance = np.log1p(np.array(table["distance"], float))
    parts: list[Part] = []
    for name in names[np.argsort(-counts)][:airports]:
        rows = np.flatnonzero(origin == name)
        rows = rows[np.argsort(minutes[rows], kind="stable")]
        wait = np.log1p(np.diff(minutes[rows], prepend=minutes[rows[0]]))
        hour = minutes[rows] % 1440 / 1440 * 2 * math.pi
        features = np.stack([delay[rows], wait, distance[rows], np.sin(hour), np.cos(hour)], axis=1)
        parts.append((features[:-1], np.stack([delay[rows][1:], wait[1:]], axis=1)))
    return parts


FORECASTS: dict[str, Callable[[Path], list[Part]]] = {
    "S&P 500 volatility": lambda folder: volatility(folder / "sp500.csv.gz", "Adj Close", "%m/%d/%Y"),
    "WTI volatility": lambda folder: volatility(folder / "wti.csv.gz", "DCOILWTICO", "%m/%d/%Y"),
    "glucose": lambda folder: glucose(folder / "CGM.csv.gz"),
    "flights": lambda folder: flights(folder / "flights-3m.parquet"),
}
CLASSIFICATIONS = ("ACSF1", "PLAID")
SHARES = (0.8, 0.9)  # of the time: training, then validation, then test


def forecast_arrays(task: str, data: Path) -> dict[str, np.ndarray]:
    """Features and targets of all series one after the other, standardised by the training part, with their ends."""

    def make() -> dict[str, np.ndarray]:
        parts = FORECASTS[task](data / FOLDER)
        early = [slice(int(SHARES[0] * len(features))) for features, _ in parts]
        arrays = {"ends": np.cumsum([len(features) for features, _ in parts])}
        for place, name in enumerate(("features", "targets")):
            known = np.concatenate([part[place][cut] for part, cut in zip(parts, early, strict=True)])
            values = np.concatenate([part[place] for part in parts])
            arrays[name] = ((values - known.mean(0)) / known.std(0).clip(1e-6)).clip(-8, 8).astype(np.float32)
        return arrays

    return prepared(data, f"series-{task}", make)


def labelled(task: str, data: Path) -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]:
    """Training and test series [T, 1] with classes, from a .ts file: values, a colon, the class."""

    def read(part: str) -> list[tuple[Tensor, int]]:
        path = need(data / FOLDER / f"{task}_{part}.ts", "take it from the UCR archive, or from sktime's package")
        rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] not in "#@"]
        split = [row.rpartition(":") for row in rows]
        series = [torch.tensor([float(x) for x in values.split(",")]) for values, _, _ in split]
        return [
            (((x - x.mean()) / x.std().clamp_min(1e-6))[:, None], int(label))
            for x, (_, _, label) in zip(series, split, strict=True)
        ]

    return read("TRAIN"), read("TEST")


class SeriesModel(nn.Module):
    """PiModel over projected features, with a linear head on each step, or on the mean of the steps."""

    def __init__(self, config: PiConfig, features: int, outputs: int, *, classify: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(features, config.hidden_size)
        self.body = PiModel(config)
        self.head = nn.Linear(config.hidden_size, outputs)
        self.classify = classify

    def forward(self, features: Tensor, targets: Tensor, mask: Tensor | None = None) -> SimpleNamespace:
        """Loss and outputs of features [B, T, F]: mean squared error, or, with a mask [B, T], cross-entropy."""
        ids = None if mask is None else segments(mask)
        hidden = self.body(inputs_embeds=self.embed(features), segment_ids=ids).last_hidden_state
        if not self.classify:
            outputs = self.head(hidden)
            return SimpleNamespace(loss=F.mse_loss(outputs.float(), targets), outputs=outputs)
        assert mask is not None
        weight = mask / mask.sum(1, keepdim=True)  # False is padding
        outputs = self.head((hidden * weight[..., None]).sum(1))
        return SimpleNamespace(loss=F.cross_entropy(outputs.float(), targets), outputs=outputs)


def padded(rows: list[tuple[Tensor, int]], length: int) -> dict[str, Tensor]:
    """A batch of labelled series, padded on the right to `length` steps."""
    features = torch.zeros(len(rows), length, 1)
    for row, (x, _) in zip(features, rows, strict=True):
        row[: len(x)] = x
    lengths = torch.tensor([len(x) for x, _ in rows])
    mask = torch.arange(length) < lengths[:, None]
    return {"features": features, "targets": torch.tensor([label for _, label in rows]), "mask": mask}


def measure(settings: Settings, data: Path) -> Result:
    """Train one variant on one task; its error is the mean square over the variance, or the share misclassified."""
    torch.manual_seed(settings["seed"])
    generator = torch.Generator().manual_seed(1 + settings["seed"])
    classify = settings["task"] in CLASSIFICATIONS
    run = _classify if classify else _forecast
    return run(settings, data, generator)


def _made(settings: Settings, features: int, outputs: int, *, classify: bool) -> SeriesModel:
    made = config(settings, vocab_size=1, causal=not classify)
    model = SeriesModel(made, features, outputs, classify=classify).to(DEVICE)
    return specialise(model, settings)


def _forecast(settings: Settings, data: Path, generator: torch.Generator) -> Result:
    arrays = forecast_arrays(settings["task"], data)
    context, batch = settings["context"], settings["batch"]
    ends = arrays["ends"].tolist()
    series = [(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    features, targets = (torch.from_numpy(arrays[name]) for name in ("features", "targets"))
    model = _made(settings, features.shape[1], targets.shape[1], classify=False)

    def rows_at(starts: list[int]) -> dict[str, Tensor]:
        cuts = [slice(start, start + context) for start in starts]
        return {
            "features": torch.stack([features[c] for c in cuts]),
            "targets": torch.stack([targets[c] for c in cuts]),
        }

    def batches() -> Iterator[dict[str, Tensor]]:
        last = [(start, start + int(SHARES[0] * (end - start)) - context) for start, end in series]
        last = [(start, stop) for start, stop in last if stop > start]
        while True:
            chosen = torch.randint(len(last), (batch,), generator=generator).tolist()
            yield rows_at([int(torch.randint(*last[i], (), generator=generator)) for i in chosen])

    final = fit(model, batches(), steps=settings["steps"], rate=settings["rate"])

    @torch.no_grad()
    def error(first: float, last: float) -> float:
        """Over the steps of a share of the time, each with at least half a context before it."""
        squares, power = [], []
        for start, end in series:
            length, half = end - start, context // 2
            stop = start + int(last * length)
            for at in range(start + int(first * length), stop, half):
                begin, count = max(start, at - half), min(half, stop - at)
                got = rows_at([begin])
                with products():
                    outputs = model(got["features"].to(DEVICE), got["targets"].to(DEVICE)).outputs
                judged = slice(at - begin, at - begin + count)
                wanted = got["targets"][0, judged]
                squares.append((outputs[0, judged].float().cpu() - wanted).square())
                power.append(wanted)
        return float(torch.cat(squares).mean() / torch.cat(power).var(0).mean())

    found = {"validation": error(SHARES[0], SHARES[1]), "test": error(SHARES[1], 1.0)}
    return {**found, "training loss": final, "parameters": sum(p.numel() for p in model.parameters())}


def _classify(settings: Settings, data: Path, generator: torch.Generator) -> Result:
    training, test = labelled(settings["task"], data)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0)).tolist()
    validation = [training[i] for i in order[: len(order) // 5]]
    training = [training[i] for i in order[len(order) // 5 :]]
    every = training + validation + test
    longest = max(len(x) for x, _ in every)
    model = _made(settings, 1, 1 + max(label for _, label in every), classify=True)

    def batches() -> Iterator[dict[str, Tensor]]:
        while True:
            rows = torch.randint(len(training), (settings["batch"],), generator=generator).tolist()
            yield padded([training[i] for i in rows], longest)

    final = fit(model, batches(), steps=settings["steps"], rate=settings["rate"])

    @torch.no_grad()
    def error(rows: list[tuple[Tensor, int]]) -> float:
        wrong = 0
        for start in range(0, len(rows), 64):
            batch = {name: value.to(DEVICE) for name, value in padded(rows[start : start + 64], longest).items()}
            with products():
                wrong += int((model(**batch).outputs.argmax(-1) != batch["targets"]).sum())
        return wrong / len(rows)

    found = {"validation": error(validation), "test": error(test)}
    return {**found, "training loss": final, "parameters": sum(p.numel() for p in model.parameters())}


def prepare(settings: Settings, data: Path) -> None:
    """Read the raw series."""
    if settings["task"] in FORECASTS:
        forecast_arrays(settings["task"], data)


def cells(scale: Scale) -> list[Settings]:
    """The main variants on each task."""
    sizes = {"hidden": 64, "layers": 3, "heads": 4, "window": 32, "period": 32, "skips": 16, "batch": 16}
    steps = {
        "S&P 500 volatility": 300,
        "WTI volatility": 300,
        "glucose": 600,
        "flights": 1000,
        "ACSF1": 400,
        "PLAID": 800,
    }
    sizes |= {"context": 512}
    if scale == "laptop":
        sizes |= {"hidden": 32, "layers": 2, "batch": 8}
        steps = dict.fromkeys(steps, 200)
    if scale == "smoke":
        sizes |= {"hidden": 16, "layers": 1, "heads": 2, "window": 8, "period": 8, "skips": 4, "batch": 2}
        steps = dict.fromkeys(steps, 2)
    return [
        {"task": task, "variant": variant, **sizes, "steps": count} for task, count in steps.items() for variant in MAIN
    ]


EXPERIMENT = Experiment(
    name="series",
    title="Non-periodic series",
    metric="test error",
    better="lower",
    cells=cells,
    measure=measure,
    rates=(1e-3, 3e-3),
    seeds=5,
    prepare=prepare,
)
