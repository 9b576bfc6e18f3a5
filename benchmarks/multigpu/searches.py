"""What is measured: the cases of each piece, and the searches whose next case depends on the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks.multigpu.operator import DENSE, PATTERNS, ways_of
from benchmarks.multigpu.rows import OUT_OF_MEMORY, Machine, Row, Rows
from benchmarks.multigpu.step import predicted
from benchmarks.multigpu.ways import GATHER, HALO, RING
from benchmarks.multigpu.workers import Case, Search
from pi_attention.distributed import Layout

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


def lengths_on(ranks: int) -> list[int]:
    """Sequences of the operator: 32,768 tokens to a million, and to half a million a GPU where that is more."""
    return [1 << power for power in range(15, 23) if 1 << power <= max(1 << 20, ranks << 19)]


def operators(
    rows: Rows, counts: Iterable[int], lengths: Callable[[int], list[int]], dense_seconds: float
) -> list[Search]:
    """The patterns of each number of ranks, in the lengths that have not been measured.

    Those that need more than half of the GPUs come one after another, in the same processes.
    """
    searches = []
    for ranks in counts:
        batch: list[Row] = []
        for pattern in (*PATTERNS, DENSE):
            known = {"piece": "operator", "pattern": pattern, "ranks": ranks, "way": ways_of(pattern, ranks)[-1]}
            found = {length: rows.of(known | {"S": length}) for length in lengths(ranks)}
            left = [length for length, row in found.items() if row is None]
            if pattern == DENSE:  # whose time grows with the square
                times = [(row["seconds"], row["S"]) for row in found.values() if row is not None]
                left = [n for n in left if all(seconds * (n / at) ** 2 <= dense_seconds for seconds, at in times)]
            if left:
                batch.append({"pattern": pattern, "lengths": left, "dense seconds": dense_seconds})
        alone = 2 * ranks > rows.machine.gpus
        batches = [tuple(batch)] if alone else [(settings,) for settings in batch]
        searches += [one(Case("operator", ranks, each, limit=150)) for each in batches if each]
    return searches


def layouts_of(ranks: int) -> list[tuple[str, int]]:
    """Layouts of so many ranks, a power of two, with ZeRO stages: each way to share by itself, and mixtures."""
    alone = [f"{name}={ranks}" for name in ("dp", "cp", "tp")]
    if ranks < 4:
        return [(layout, 3) for layout in (alone if ranks > 1 else alone[:1])]
    half = ranks // 2
    mixed = [f"dp=2,cp={half}", f"tp=2,cp={half}", f"dp={half},tp=2"]
    mixed += [f"dp=2,tp=2,cp={ranks // 4}"] if ranks > 4 else []
    stages = [(layout, zero) for layout in (alone[0], mixed[0]) for zero in (2, 1)]
    return [*((layout, 3) for layout in (*alone, *mixed)), *stages]


def layouts(counts: Iterable[int], context: int, model: str) -> list[Search]:
    """A step of each layout; and of cp without slices of the loss, whose logits the bill counts, too."""
    counts = list(counts)
    cases = [step_of(layout, context, zero=zero, model=model) for n in counts for layout, zero in layouts_of(n)]
    cases += [step_of(f"cp={n}", 2 * context, model=model, **{"loss slice": None}) for n in counts if n > 1]
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


def throughput(counts: Iterable[int], model: str, context: int, ways: Iterable[str]) -> list[Search]:
    """Steps of each way, for tokens/s: of a context, of four times that, and of as many tokens on each GPU.

    Of dense attention those whose products are computed.
    """
    cases = [
        step_of(f"cp={ranks}", length, way, model=model)
        for ranks in counts
        for length in sorted({context, 4 * context, ranks * context})
        for way in ways
        if (ranks > 1 or way != GATHER) and (length <= PRODUCTS or way != RING)
    ]
    return together(cases, counts)


def runs(ranks: int, toy: bool) -> list[Search]:
    """A run on all ranks, resumed on fewer; none where there is one."""
    settings = {"ranks": ranks, "steps": 4 if toy else 40, "toy": toy, "tolerance": 1e-4 if toy else 0.03}
    return [one(Case("run", ranks, (settings,), limit=480 if toy else 240))] if ranks > 1 else []


def killed(ranks: int, how: str, toy: bool) -> list[Search]:
    """A run whose second rank gets a signal; none where there is one."""
    settings = {"ranks": ranks, "toy": toy, "patience": 5 if toy else 15, "signal": how}
    return [one(Case("killed", ranks, (settings,), limit=480 if toy else 120))] if ranks > 1 else []


def largest(machine: Machine, ranks: int, context: int, model: str, most: int, by: int) -> Search:
    """The most layers of a model's shape that fit, at most `most`, from the bill's guess on, by so many layers."""

    def case(layers: int) -> Case:
        return step_of(f"cp={ranks}", context, model=model, layers=layers)

    layers = by
    while layers + by <= most and predicted(case(layers + by).batch[0]) < SHARE * machine.memory:
        layers += by
    return border(layers, lambda size: size + by, lambda size: size - by, case, most=most)
