"""What patterns see, computed, and what networks depend on: the Jacobian against the predicted receptive field.

python -m benchmarks.theory                  # writes results/one_layer.json: joint coverage and density of a layer
pi-attention train --out runs/demo
python -m benchmarks.theory runs/demo        # also results/influence.json and docs/figures/influence.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import RESULTS, write
from pi_attention import PiPattern, plots
from pi_attention.cli.runs import load_run
from pi_attention.heads import coordinated_heads, coprime_periods, dilated_heads, geometric_periods
from pi_attention.models import PiForCausalLM
from pi_attention.receptive_field import ReceptiveField, joint_coverage, key_density, receptive_field
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
"""The examples for one layer: 80 keys a query, four heads, as in the language models of docs/data-language.md."""


def fields(context: int, layers: int = 8) -> dict[str, ReceptiveField]:
    """What the last token of a context sees through so many layers, by example."""
    return {name: receptive_field([pattern] * layers, context) for name, pattern in PATTERNS.items()}


def one_layer(context: int = 2048, edges: tuple[int, ...] = (0, 16, 64, 256, 1024)) -> dict[str, Any]:
    """What the heads of each example see together in one layer, keys a lag by range, and the layers to see all."""
    rows = []
    for name, pattern in ONE_LAYER.items():
        covered = joint_coverage(pattern, context)
        density = [float(share) for *_, share in key_density(pattern, context, edges)]
        row = {"name": name, "pattern": pattern.to_dict(), "stretch": covered.stretch, "holes": len(covered.holes())}
        hops = receptive_field([pattern] * 12, context).layers_to_cover()
        rows.append(row | {"reach": covered.reach, "density": density, "layers to see everything": hops})
    return {"context": context, "edges": list(edges), "layers at most": 12, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    print(write("one_layer", one_layer()))
    if options.run is None:
        return
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
