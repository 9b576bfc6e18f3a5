"""What networks depend on, random and trained: the Jacobian of the last position against the predicted receptive field.

pi-attention train --out runs/demo
python -m benchmarks.theory runs/demo        # writes results/influence.json and docs/figures/influence.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import RESULTS, write
from pi_attention import PiPattern, plots
from pi_attention.cli.runs import load_run
from pi_attention.models import PiForCausalLM
from pi_attention.pattern import coordinated_heads, coprime_periods, dilated_heads, geometric_periods
from pi_attention.receptive_field import ReceptiveField, receptive_field
from pi_attention.tasks.influence import influence

FIGURES = RESULTS.parents[1] / "docs" / "figures"
PATTERNS = {
    "ring-local": PiPattern(72, 1, 0),
    "π": PiPattern(64, 64, 8),
    "π, geometric periods": PiPattern(64, geometric_periods(64, 4096, 4), 8),
    "π, coprime heads": PiPattern(64, coprime_periods(64, 4), 8),
    "coordinated heads": coordinated_heads(16, 56, heads=4),
}
"""The examples of docs/theory.md: 72 keys a query."""
ONE_LAYER = {
    "ring-local": PiPattern(80, 1, 0),
    "π": PiPattern(64, 64, 16),
    "dilated heads": dilated_heads(16, 64, heads=4, context=2048),
    "coordinated heads": coordinated_heads(16, 64, heads=4),
    "the same, a quarter of the phases": PiPattern(16, 16, 64, phase=(0, 4, 8, 12)),
}
"""The examples for one layer: 80 keys a query, four heads, as in the language models of docs/results.md."""


def fields(context: int, layers: int = 8) -> dict[str, ReceptiveField]:
    """What the last token of a context sees through so many layers, by example."""
    return {name: receptive_field([pattern] * layers, context) for name, pattern in PATTERNS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    trained, tokenizer = load_run(options.run)
    torch.manual_seed(0)
    text = tokenizer("To be, or not to be, that is the question: " * options.tokens)["input_ids"]
    ids = torch.tensor(text[: options.tokens])[None]
    result: dict[str, Any] = {"pattern": str(trained.config.pattern), "tokens": options.tokens, "networks": []}
    for name, model in (("random", PiForCausalLM(trained.config)), ("trained", trained)):
        found = influence(model, ids)
        rows = [{"layers": n, "positions": count, "median norm": norm} for n, count, norm in found.by_hops()]
        result["networks"].append({"weights": name, "contradictions": found.wrong, "by layers needed": rows})
    plots.save(plots.influence_picture(found), FIGURES / "influence.svg")
    print(write("influence", result))


if __name__ == "__main__":
    main()
