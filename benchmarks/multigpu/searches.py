"""What is measured: the cases of each piece, and the searches whose next case depends on the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks.multigpu.operator import DENSE, PATTERNS, ways_of
from benchmarks.multigpu.rows import OUT_OF_MEMORY, Machine, Row, Rows
from benchmarks.multigpu.step import predicted
from benchmarks.multigpu.ways import GATHER, HALO, RING
from benchmarks.multigpu.workers import Case, Search
from pi_attention.distributed import Layout

LAYOUTS = [("dp=1", 3), ("dp=2", 3), ("cp=2", 3), ("tp=2", 3), ("dp=4", 3), ("dp=4", 2), ("dp=4", 1), ("cp=4", 3),
           ("tp=4", 3), ("dp=2,cp=2", 3), ("tp=2,cp=2", 3), ("dp=2,tp=2", 3)]  # fmt: skip
"""Layouts and ZeRO stages."""
WAYS = [HALO, GATHER, RING]
PRODUCTS = 1 << 17
"""Longest sequence whose dense products are computed in a training step; beyond, memory alone is measured."""
SHARE = 0.88
"""Of a GPU's memory that the bill may take before a case is believed not to fit."""

Step = Callable[[int], int]


def step_of(layout: str, context: int, way: str = HALO, zero: int = 3, *, model: str = "1b", **others: object) -> Case:
    """A training step.

    Args:
        layout: as `Layout.parse` takes it.
        context: tokens of a sequence.
        way: to the keys.
        zero: stage.
        model: a name of `bill.MODELS`, or "toy".
        others: settings to change: "loss slice", layers, pattern, blocks.
    """
    settings: Row = {"model": model, "layers": None, "layout": str(Layout.parse(layout)), "zero": zero, "way": way}
    settings |= {"pattern": "one period", "S": context, "loss slice": 4096, "blocks": 2 if zero == 1 else 1}
    settings["hollow"] = way == RING and context > PRODUCTS
    return Case("step", Layout.parse(layout).ranks, (settings | others,))


def one(case: Case) -> Search:
    """A search of a single case."""
    yield case


def together(cases: Iterable[Case], counts: Iterable[int]) -> list[Search]:
    """Training steps of the same number of ranks in the same processes."""
    batches = {ranks: tuple(case.batch[0] for case in cases if case.ranks == ranks) for ranks in counts}
    return [one(Case("step", ranks, batch)) for ranks, batch in batches.items() if batch]


def operators(rows: Rows, counts: Iterable[int], lengths: list[int], dense_seconds: float) -> list[Search]:
    """A case for each number of ranks and pattern, of the lengths that have not been measured."""
    cases = []
    for ranks in counts:
        for pattern in (*PATTERNS, DENSE):
            ways = ways_of(pattern, ranks)
            known = {"piece": "operator", "pattern": pattern, "ranks": ranks, "way": ways[-1]}
            left = [length for length in lengths if rows.of(known | {"S": length}) is None]
            settings = {"pattern": pattern, "lengths": left, "dense seconds": dense_seconds}
            if left:
                cases.append(Case("operator", ranks, (settings,), limit=150))
    return [one(case) for case in cases]


def layouts(counts: Iterable[int], context: int, model: str) -> list[Search]:
    """A step of each layout; and of cp without slices of the loss, whose logits the bill counts, too."""
    cases = [step_of(layout, context, zero=zero, model=model) for layout, zero in LAYOUTS]
    cases += [step_of(f"cp={ranks}", 2 * context, model=model, **{"loss slice": None}) for ranks in (2, 4)]
    return together(cases, counts)


def patterns(counts: Iterable[int], context: int, model: str) -> list[Search]:
    """A step of each pattern."""
    cases = [step_of(f"cp={ranks}", context, model=model, pattern=name) for ranks in counts for name in PATTERNS]
    return together(cases, counts)


def contexts(
    machine: Machine, counts: Iterable[int], model: str, ways: Iterable[str], least: int, most: int
) -> list[Search]:
    """The longest sequence that fits, for each way and number of ranks."""
    pairs = [(ranks, way) for ranks in counts for way in ways if ranks > 1 or way != GATHER]
    return [longest(machine.memory, ranks, way, model, least, most) for ranks, way in pairs]


def border(start: int, up: Step, down: Step, case: Callable[[int], Case], *, least: int = 1, most: int) -> Search:
    """Cases of growing or shrinking size, until the largest that fits is known.

    Args:
        start: size that is tried first.
        up, down: the next larger and smaller size.
        case: of a size.
        least, most: sizes that are tried.
    """
    size, fits, fails = start, least - 1, most + 1
    while fits < size < fails:
        row = yield case(size)
        if row is None or row.get("failed") not in (None, OUT_OF_MEMORY):
            return  # it is not known whether it fits
        if "failed" in row:
            size, fails = down(size), size
        else:
            size, fits = up(size), size


def longest(memory: int, ranks: int, way: str, model: str, least: int, most: int) -> Search:
    """The longest sequence that fits, a power of two, from the bill's guess on."""

    def case(context: int) -> Case:
        return step_of(f"cp={ranks}", context, way, model=model)

    context = least
    while context < most and predicted(case(2 * context).batch[0]) < SHARE * memory:
        context *= 2
    return border(context, lambda size: 2 * size, lambda size: size // 2, case, least=least, most=most)


def throughput(counts: Iterable[int], model: str, lengths: Iterable[int], ways: Iterable[str]) -> list[Search]:
    """Steps of each way at contexts whose dense products are computed, for tokens/s."""
    lengths = [length for length in lengths if length <= PRODUCTS]
    cases = [
        step_of(f"cp={ranks}", length, way, model=model)
        for ranks in counts
        for length in lengths
        for way in ways
        if ranks > 1 or way != GATHER
    ]
    return together(cases, counts)


def largest(machine: Machine, ranks: int, context: int, model: str, most: int, by: int = 4) -> Search:
    """The most layers of a model's shape that fit, at most `most`, from the bill's guess on, by so many layers."""

    def case(layers: int) -> Case:
        return step_of(f"cp={ranks}", context, model=model, layers=layers)

    layers = by
    while layers + by <= most and predicted(case(layers + by).batch[0]) < SHARE * machine.memory:
        layers += by
    return border(layers, lambda size: size + by, lambda size: size - by, case, most=most)
