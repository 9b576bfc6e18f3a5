"""The attention variants that every experiment compares: patterns and flags of one model, at one key budget.

Ring-local appears twice: with the window of π-attention, and with all of its keys, window + skips. What a variant
without a gate saves in parameters goes into the width of its feed-forward network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import forms
from experiments.experiment import Settings
from experiments.forms import BASELINE
from pi_attention.heads import coordinated_heads, coprime_periods, dilated_heads, geometric_periods
from pi_attention.models import PiConfig
from pi_attention.nn import PiAttention
from pi_attention.nn.gate import GATE_WIDTH
from pi_attention.nn.sources import KeySource, Operator
from pi_attention.pattern import PiPattern
from pi_attention.planner import plan

DILATED_HEADS = "pi, dilated heads"
"""A quarter of the window; what it saves goes to skips, whose period is 1 in the first head and grows by head."""
VARIANTS = (
    "dense",
    "ring-local, same window",
    BASELINE,
    "pi",
    "pi, no gate",
    "pi, fixed half",
    "pi, mass gate",
    "pi, coprime heads",
    "pi, geometric heads",
    "window + sinks",
    "dilated",
    DILATED_HEADS,
)
PLANNED = "pi, planned"
"""The periods that the planner chooses for the context, the layers and the keys."""
COORDINATED_HEADS = "pi, coordinated heads"
"""A quarter of the window; what it saves goes to skips of period 4, with phases over the heads; one softmax."""
COORDINATED = (
    COORDINATED_HEADS,
    "pi, coordinated heads, mass gate",
    "pi, coordinated heads, gate",
    "pi, coordinated heads, half window",
    "pi, dilated heads, no gate",
)
"""Heads that share the distance, by every fusion, with half of the window, and beside dilated heads without a gate."""
ONE_DENSE = "ring-local + dense layer"
"""What one would use where a decision needs the whole input: windows, and a layer that sees everything."""
ONE_GLOBAL = "ring-local + coordinated global layer"
"""The same, where that layer has coordinated heads with every skip."""
HYBRIDS = (
    ONE_DENSE,
    "coordinated + dense layer",
    "dilated + dense layer",
    ONE_GLOBAL,
    "coordinated + coordinated global layer",
)
"""The middle layer sees everything: by dense attention, or by coordinated heads with every skip, each a quarter."""
RANDOM_BLOCKS = "window + sinks + random blocks"
"""As in BigBird (arXiv 2007.14062): a window, the first keys, and blocks of earlier keys drawn at random."""
MAIN = ("dense", BASELINE, "pi", "pi, coprime heads")
"""The variants of experiments that do not study the gate."""
CLAIMED = (*MAIN, COORDINATED_HEADS)
"""Those, and the best form of language models."""
WITH_SINKS = ("window + sinks", "pi + sinks", "pi, coprime heads + sinks", "pi, coordinated heads + sinks")
"""Variants whose first keys are sinks, in place of skips or of the window."""


def attention(settings: Settings) -> dict[str, Any]:
    """What a variant says of the attention, as fields of `PiConfig`.

    Args:
        settings: variant and keys of a form, heads, context; or variant, window, period, skips, heads, and what some
            variants need: context, for periods that depend on it; layers, for those that are planned and for hybrids;
            sinks, 4 without it.

    Raises:
        ValueError: there is no such variant.
    """
    if "keys" in settings:
        return forms.attention(settings)
    variant, heads, layers = settings["variant"], settings["heads"], settings.get("layers", 1)
    w, period, m = settings["window"], settings["period"], settings["skips"]
    sinks, context = min(settings.get("sinks", 4), m), settings["context"]
    pi, local = PiPattern(w, period, m), PiPattern(w + m, period, 0)
    coprime = replace(pi, period=coprime_periods(period, heads))
    geometric = geometric_periods(period, max(period, (context - 1) // max(1, m)), heads)
    with_sinks = {"skips": m - sinks, "sinks": sinks}
    quarter, half = max(1, w // 4), max(1, w // 2)
    dilated = dilated_heads(quarter, w + m - quarter, heads, context)
    coordinated = coordinated_heads(quarter, w + m - quarter, heads, period=4)
    wider = coordinated_heads(half, w + m - half, heads, period=4)
    everything = {name: coordinated.to_dict()[name] for name in ("window", "period", "phase")} | {"skips": None}
    plain: dict[str, Any] = {"gate": False}
    before, after = ["pi"] * (layers // 2), ["pi"] * (layers - layers // 2 - 1)
    dense_layer: dict[str, Any] = plain | {"layer_patterns": [*before, "dense", *after]}
    global_layer: dict[str, Any] = plain | {"layer_patterns": [*before, everything, *after]}
    chosen: dict[str, tuple[PiPattern, dict[str, Any]]] = {
        "dense": (pi, plain | {"layer_patterns": ["dense"]}),
        "ring-local, same window": (replace(pi, skips=0), plain),
        BASELINE: (local, plain),
        "pi": (pi, {"fusion": "gate"}),
        "pi, no gate": (pi, plain),
        "pi, fixed half": (pi, {"fusion": "gate"}),
        "pi, mass gate": (pi, {"fusion": "mass"}),
        "pi, coprime heads": (coprime, {}),
        "pi, geometric heads": (replace(pi, period=geometric), {}),
        "window + sinks": (replace(local, window=w + m - sinks, sinks=sinks), plain),
        "pi + sinks": (replace(pi, **with_sinks), {}),
        "pi, coprime heads + sinks": (replace(coprime, **with_sinks), {}),
        "pi, coordinated heads + sinks": (replace(coordinated, skips=coordinated.skips - sinks, sinks=sinks), plain),
        "dilated": (dilated_heads(1, w + m - 1, heads, context), plain),
        DILATED_HEADS: (dilated, {}),
        "pi, dilated heads, no gate": (dilated, plain),
        COORDINATED_HEADS: (coordinated, plain),
        "pi, coordinated heads, mass gate": (coordinated, {"fusion": "mass"}),
        "pi, coordinated heads, gate": (coordinated, {"fusion": "gate"}),
        "pi, coordinated heads, half window": (wider, plain),
        ONE_DENSE: (local, dense_layer),
        "coordinated + dense layer": (coordinated, dense_layer),
        "dilated + dense layer": (dilated, dense_layer),
        ONE_GLOBAL: (local, global_layer),
        "coordinated + coordinated global layer": (coordinated, global_layer),
    }
    if variant == PLANNED:
        chosen[PLANNED] = (plan(context, layers, heads=heads, budget=w + m).pattern, {})
    chosen[RANDOM_BLOCKS] = chosen["dense"]  # `specialise` puts the mask in
    if variant not in chosen:
        raise ValueError(f"variant={variant!r} is unknown: use one of {list(chosen)}.")
    pattern, more = chosen[variant]
    return pattern.to_dict() | {"gate": True} | more


def config(settings: Settings, **more: Any) -> PiConfig:
    """The model of a row.

    Args:
        settings: those of `attention`, and hidden, layers, context.
        more: fields of `PiConfig`, such as vocab_size.

    Raises:
        ValueError: there is no such variant.
    """
    heads = settings["heads"]
    sizes = {
        "hidden_size": settings["hidden"],
        "num_hidden_layers": settings["layers"],
        "num_attention_heads": heads,
        "max_position_embeddings": settings["context"],
        "qk_norm": True,
        "use_cache": False,
    }
    made = PiConfig(**sizes | attention(settings) | more)
    if not made.gate:  # the two layers of the gate, with biases
        gate = (made.hidden_size + 1) * GATE_WIDTH + (GATE_WIDTH + 1) * heads
        made.intermediate_size += 8 * round(gate / (24 * made.hidden_size))  # a width that tensor cores like
    return made


def specialise(model: Any, settings: Settings) -> Any:
    """The model with what no configuration says: a gate fixed at one half, or the mask of random blocks.

    Args:
        model: made from `config(settings)`.
        settings: of the row; its seed draws the blocks.
    """
    if settings["variant"] == "pi, fixed half":
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                parameter.data.zero_()
                parameter.requires_grad_(False)
    elif settings["variant"] == RANDOM_BLOCKS:
        generator = torch.Generator().manual_seed(settings["seed"])
        layers = [module for module in model.modules() if isinstance(module, PiAttention)]
        for layer in layers:
            mask = random_blocks(settings["context"], settings["window"], settings["skips"], generator)
            layer.source = RandomBlocks(mask.to(layer.q_proj.weight.device))
    return model


SIDE = 4
"""Keys of a random block; as many are sinks."""


def random_blocks(length: int, window: int, skips: int, generator: torch.Generator) -> Tensor:
    """Mask [length, length] of a window, `SIDE` sinks, and random blocks that make up `skips` keys a query with them.

    The queries of a block of `window` tokens share their random blocks, which lie before the window.
    """
    number = torch.arange(length)
    query, key = number[:, None], number
    mask = (query - key < window) | (key < SIDE)
    for start in range(window, length, window):
        places = (start - window + 1) // SIDE  # whole blocks before every window of these queries
        chosen = 1 + torch.randperm(max(0, places - 1), generator=generator)[: skips // SIDE - 1]  # 0 are the sinks
        mask[start : start + window] |= torch.isin(key // SIDE, chosen)
    return mask & (key <= query)


class RandomBlocks(KeySource):
    """The keys that a mask [context, context] shows, whatever the layer's pattern; a `KeySource`."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def position(self, cache: Any = None) -> int:
        """Position of the first token: the sequence is whole."""
        return 0

    def attend(
        self,
        operator: Operator,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None,
        segment_ids: Tensor | None = None,
        *,
        cache: Any = None,
        once: bool = False,
    ) -> Tensor:
        """Masked attention instead of the operator, [B, H, T, D]; without gate, segments and cache."""
        assert gate is None and segment_ids is None and cache is None
        tokens = query.shape[2]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask[:tokens, :tokens])
