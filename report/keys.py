"""How many keys a query of a variant really sees: early queries have no far past, and plans may spend less."""

from __future__ import annotations

from statistics import fmean

import torch

from experiments import pretrained
from experiments.experiment import Settings
from experiments.registry import EXPERIMENTS
from experiments.variants import RANDOM_BLOCKS, config, random_blocks
from pi_attention.accounting import decoding_keys, visible_pairs
from pi_attention.pattern import PiPattern
from report.markdown import table

PRETRAINED: dict[str, Settings] = {
    "smollm2": {"hidden": 576, "layers": 30, "heads": 9},
    "gemma3": {"hidden": 640, "layers": 18, "heads": 4},
}
"""SmolLM2-135M and Gemma 3 270M, of which the settings name no sizes."""
OWN_WINDOWS = {"gemma3": (512, (5, 11, 17))}
"""Keys of a window that layers have of their own, and the layers that see everything, which forms are given to."""
BIDIRECTIONAL = ("listops", "lra", "lra_pooled", "image_text")
CLASSIFIED = ("ACSF1", "PLAID")
"""Series that are classified, and so read both ways."""
PLANNED = "pi, planned"


def patterns(name: str, cell: Settings) -> list[PiPattern]:
    """Of the layers of a cell of an experiment."""
    if name == "pretrained":
        sizes = PRETRAINED[cell["pretrained"]]
        window, free = OWN_WINDOWS.get(cell["pretrained"], (0, range(sizes["layers"])))
        given = iter(pretrained.forms(cell["keys"], sizes["heads"])[cell["variant"]].patterns(len(free)))
        return [next(given) if layer in free else PiPattern(window, 1, 0) for layer in range(sizes["layers"])]
    causal = name not in BIDIRECTIONAL and cell.get("task") not in CLASSIFIED
    sizes = PRETRAINED[cell["pretrained"]] if "pretrained" in cell else {}
    return config({**sizes, **cell}, vocab_size=1, causal=causal).patterns()


def mean_keys(name: str, cell: Settings) -> float:
    """Keys that a query sees, over the queries of the context, the heads and the layers."""
    length = cell["context"]
    if cell["variant"] == RANDOM_BLOCKS:
        mask = random_blocks(length, cell["window"], cell["skips"], torch.Generator().manual_seed(0))
        return float(mask.sum()) / length
    of_heads = [
        sum(visible_pairs(pattern, length, head=head))
        for pattern in patterns(name, cell)
        for head in range((PRETRAINED[cell["pretrained"]] if "pretrained" in cell else cell)["heads"])
    ]
    return fmean(of_heads) / length


def planned() -> str:
    """What the planner chose where the others have all of the budget."""
    chosen: dict[str, list[str]] = {}
    for name in ("language_modelling_long", "recall"):
        for cell in EXPERIMENTS[name].cells("small"):
            if cell["variant"] == PLANNED:
                pattern, context = patterns(name, cell)[0], cell["context"]
                budget, layers = cell["window"] + cell["skips"], cell["layers"]
                periods = ", ".join(map(str, dict.fromkeys(pattern.periods)))
                most = max(sum(decoding_keys(pattern, context, head=head)) for head in range(cell["heads"]))
                line = [f"{context:,}", str(layers), str(budget), str(most), f"{mean_keys(name, cell):.1f}", periods]
                chosen.setdefault(" ".join(line), line)
    head = ["context", "layers", "budget of keys", "keys at most", "keys on average", "periods"]
    return table(head, list(chosen.values()))
