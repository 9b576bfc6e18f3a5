"""One question at the end: associative recall, needles, and variables that are copied, by depth and length.

Statements [SAY, key, value] stand among filler; at the end the key of one is said, and its value is to be predicted.
Many short statements are associative recall, few long ones are needles. A variable's value may be an earlier variable:
then its value is that of the first of the chain. Training asks for several statements of a sequence, each of them
once, so that no answer can be copied from an earlier question. It begins with short texts of four statements: with 16
from the start, dense attention learned which values are left, and never to look a key up (LOG.md).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from experiments.experiment import Experiment, Result, Scale, Settings
from experiments.forms import BASELINE
from experiments.training import DEVICE, fit_by_length, products, steps_by_length
from experiments.variants import config
from pi_attention.models import PiForCausalLM

KEYS, VALUES, FILLER = 128, 128, 32
SAY, ASK = KEYS + VALUES, KEYS + VALUES + 1
REST = ASK + 1  # the first filler
VOCABULARY = REST + FILLER
IGNORE = -100
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def distinct(batch: int, count: int, most: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers below `most` for each row [batch, count], in random order."""
    return torch.rand(batch, most, generator=generator).argsort(dim=1)[:, :count]


def words(batch: int, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` different keys of `length` tokens for each row, [batch, count, length]."""
    of_token = torch.stack([distinct(batch, KEYS, KEYS, generator) for _ in range(length)], dim=-1)
    return of_token[:, :count]  # already the first tokens differ


def sequences(
    batch: int, length: int, task: Settings, asked: int, generator: torch.Generator, depth: float | None = None
) -> tuple[Tensor, Tensor]:
    """Input ids and labels [batch, length]: statements among filler, then `asked` questions.

    Args:
        batch, length: the shape.
        task: statements, key, value (tokens of each), hops (copies of each variable).
        asked: how many of the statements are asked for, each once.
        generator: draws everything.
        depth: where the statement of the first question stands, from 0 to 1; anywhere if None.

    Raises:
        ValueError: the statements do not fit.
    """
    key, value, hops, chains = task["key"], task["value"], task["hops"], task["statements"]
    size, count = 1 + key + value, chains * (1 + hops)
    places = (length - asked * size) // size
    if places < count or count > KEYS:
        raise ValueError(f"{count} statements of {size} tokens and {asked} questions do not fit into length={length}.")
    ids = REST + torch.randint(FILLER, (batch, length), generator=generator)
    labels = torch.full_like(ids, IGNORE)
    names = words(batch, count, key, generator).view(batch, chains, 1 + hops, key)
    values = KEYS + torch.randint(VALUES, (batch, chains, value), generator=generator)
    said = torch.cat([values[:, :, None], names[:, :, :-1]], dim=2) if hops else values[:, :, None]
    if depth is None:
        slots = distinct(batch, count, places, generator)
    else:
        shown = round(depth * (places - 1))
        others = distinct(batch, count - 1, places - 1, generator)
        slots = torch.cat([torch.full((batch, 1), shown), others + (others >= shown)], dim=1)
    slots = slots.view(batch, chains, 1 + hops).sort(dim=2).values
    statements = torch.cat([torch.full_like(names[..., :1], SAY), names, said], dim=-1)
    _put(ids, slots.flatten(1) * size, statements.flatten(1, 2))
    first = torch.tensor([length - (asked - number) * size for number in range(asked)]).expand(batch, asked)
    of = names[:, :asked, -1]
    _put(ids, first, torch.cat([torch.full_like(of[..., :1], ASK), of, values[:, :asked]], dim=-1))
    _put(labels, first + 1 + key, values[:, :asked])
    return ids, labels


def _put(ids: Tensor, first: Tensor, tokens: Tensor) -> None:
    """Write runs of tokens [batch, N, n] into ids [batch, T] from the places `first` [batch, N] on."""
    ids.scatter_(1, (first[:, :, None] + torch.arange(tokens.shape[2])).flatten(1), tokens.flatten(1))


@torch.no_grad()
def accuracy(model: PiForCausalLM, ids: Tensor, labels: Tensor) -> float:
    """The share of sequences whose whole answer is predicted."""
    right = []
    for row, label in zip(
        ids.split(max(1, 65536 // ids.shape[1])), labels.split(max(1, 65536 // ids.shape[1])), strict=True
    ):
        with products():
            guess = model(row.to(DEVICE), use_cache=False).logits[:, :-1].argmax(-1).cpu()
        right.append(((guess == label[:, 1:]) | (label[:, 1:] == IGNORE)).all(dim=1))
    return float(torch.cat(right).float().mean())


def measure(settings: Settings, data: Path) -> Result:
    """Train a variant at one length after the other; then the accuracy of one question, by length and depth."""
    torch.manual_seed(settings["seed"])
    generator = torch.Generator().manual_seed(1 + settings["seed"])
    model = PiForCausalLM(config(settings, vocab_size=VOCABULARY)).to(DEVICE)
    lengths = [*settings["shorter first"], settings["context"]]

    def batches(length: int) -> Iterator[dict[str, Tensor]]:
        task = within(settings, length)
        while True:
            ids, labels = sequences(settings["tokens"] // length, length, task, task["asked"], generator)
            yield {"input_ids": ids, "labels": labels}

    last, _ = fit_by_length(model, batches, steps_by_length(settings), rate=settings["rate"])

    def by_depth(length: int, drawn: torch.Generator) -> dict[str, float]:
        task = within(settings, length)
        depths = DEPTHS if settings["hops"] == 0 else (None,)
        return {str(d): accuracy(model, *sequences(settings["tested"], length, task, 1, drawn, d)) for d in depths}

    grids = []
    for seed in (0, 1):  # the questions are the same for every variant
        drawn = torch.Generator().manual_seed(seed)
        grids.append({str(length): by_depth(length, drawn) for length in lengths})
    validation, test = (statistics.fmean(grid[str(settings["context"])].values()) for grid in grids)
    return {
        "validation": validation,
        "test": test,
        "by length and depth": grids[1],
        "training loss": last,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


TASKS: dict[str, Settings] = {
    "16 pairs": {"statements": 16, "key": 1, "value": 1, "hops": 0, "asked": 16},
    "one needle": {"statements": 1, "key": 2, "value": 4, "hops": 0, "asked": 1},
    "64 pairs": {"statements": 64, "key": 1, "value": 1, "hops": 0, "asked": 16},
    "16 needles": {"statements": 16, "key": 2, "value": 4, "hops": 0, "asked": 4},
    "variables": {"statements": 4, "key": 1, "value": 1, "hops": 3, "asked": 4},
}
HYBRIDS = tuple(f"{BASELINE} + {whole}, 1 in 6" for whole in ("dense", "coordinated 4"))
FEWEST = 4
"""Statements, copies among them, of the shortest texts."""


def shortest(task: Settings) -> int:
    """The least power of two into which statements and questions fit: they fill more than half of it."""
    size, count = 1 + task["key"] + task["value"], task["statements"] * (1 + task["hops"])
    return 2 ** math.ceil(math.log2((count + 1 + task["asked"]) * size))


def within(task: Settings, length: int) -> Settings:
    """The task with as many of its statements and questions as fit into a length, but `FEWEST` statements at least."""
    found = dict(task)
    while shortest(found) > length and found["statements"] * (1 + found["hops"]) > FEWEST:
        found["statements"] //= 2
        found["asked"] = min(found["asked"], found["statements"])
    return found


def cells(scale: Scale) -> list[Settings]:
    """Every task from 2,048 to 32,768 tokens, the shorter contexts first."""
    if scale == "laptop":
        return []
    sizes = {"keys": 80, "hidden": 256, "layers": 6, "heads": 4, "tokens": 32768, "tested": 128}
    contexts, steps, variants = (2048, 8192, 32768), 12000, ("coordinated 4", BASELINE, "dense", *HYBRIDS)
    if scale == "smoke":
        sizes = {"keys": 20, "hidden": 32, "layers": 2, "heads": 4, "tokens": 1024, "tested": 2}
        contexts, steps, variants = (512,), 16, ("coordinated 4", BASELINE)
    made = []
    for context in contexts:
        for name, task in TASKS.items():
            first = shortest(within(task, 1))
            lengths = [2**power for power in range(16) if first <= 2**power < context]
            trained = {"context": context, "shorter first": lengths, "steps": steps}
            made += [{"variant": variant, "task": name, **sizes, **trained, **task} for variant in variants]
    return made


EXPERIMENT = Experiment(
    name="questions",
    title="One question at the end",
    metric="accuracy",
    better="higher",
    cells=cells,
    measure=measure,
    rates=(1e-3,),
    seconds=lambda settings: 25 + settings["steps"] / 150,
)
