"""What networks do: gradients, attention weights and gates."""

from __future__ import annotations

import itertools

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pi_attention.plots.style import COLOURS, figure_of
from pi_attention.tasks.influence import Influence


def influence_picture(found: Influence) -> Figure:
    """The Jacobian's norm by lag, coloured by the layers that a lag needs; predicted holes are left blank."""
    figure, axes = figure_of(7, 3.2)
    hops, lag = torch.tensor(found.field.hops()), found.field.query - torch.arange(found.field.context)
    for layers in range(found.field.layers + 1):
        chosen = (hops == layers) & (found.norm > 0)
        if bool(chosen.any()):
            colour = COLOURS[layers % len(COLOURS)]
            axes.scatter(lag[chosen], found.norm[chosen], s=4, color=colour, label=f"{layers} layers")
    axes.set(xlabel="lag (tokens back)", ylabel="norm of the gradient", yscale="log")
    axes.legend(ncols=2, markerscale=3)
    return figure


def mass_by_lag_picture(maps: list[Tensor]) -> Figure:
    """Mean attention weight by lag and layer, from attention maps [B, H, T, T] of every layer."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for layer, weights in enumerate(maps):
        mean = weights.double().mean(dim=(0, 1))
        lines[f"layer {layer}"] = [
            (lag + 1, value) for lag in range(len(mean)) if (value := float(mean.diagonal(-lag).mean())) > 0
        ]
    figure, axes = figure_of(7, 3.2)
    for (label, points), colour in zip(lines.items(), itertools.cycle(COLOURS), strict=False):
        axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=".", markersize=2, linestyle="")
    axes.set(xlabel="lag + 1 (tokens back)", ylabel="mean attention weight", xscale="log", yscale="log")
    axes.legend(ncols=2, markerscale=4)
    return figure


def gate_picture(gates: list[Tensor]) -> Figure:
    """Weight g of the local band by layer, head and position; each entry is a layer's [H, T]. White: no skip key."""
    figure, axes = figure_of(8, 0.6 + 0.9 * len(gates), nrows=len(gates), squeeze=False, sharex=True)
    for layer, gate in enumerate(gates):
        heads, length = gate.shape
        shown = torch.nn.functional.adaptive_avg_pool1d(gate[None], min(length, 256))[0]
        axis = axes[layer, 0]
        axis.imshow(
            shown.numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest",
            extent=(0, length, heads - 0.5, -0.5),
        )  # fmt: skip
        axis.set(ylabel=f"layer {layer}\nhead", yticks=range(heads))
        axis.grid(False)
    axes[-1, 0].set(xlabel="position in the context")
    figure.colorbar(axes[0, 0].images[0], ax=axes, label="weight of the local band")
    return figure
