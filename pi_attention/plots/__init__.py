"""Every picture, in one look."""

from pi_attention.plots.lines import curves, flops_picture, intervals, loss_by_position, loss_curve
from pi_attention.plots.network import gate_picture, influence_picture, mass_by_lag_picture
from pi_attention.plots.pattern import pattern_picture, stack_picture, telling_length
from pi_attention.plots.reach import coverage_picture, density_picture, growth_picture, hops_picture
from pi_attention.plots.style import COLOURS, HEADS, LOCAL, PAPER, SINKS, SKIP, STYLE, save

__all__ = [
    "COLOURS",
    "HEADS",
    "LOCAL",
    "PAPER",
    "SINKS",
    "SKIP",
    "STYLE",
    "coverage_picture",
    "curves",
    "density_picture",
    "flops_picture",
    "gate_picture",
    "growth_picture",
    "hops_picture",
    "influence_picture",
    "intervals",
    "loss_by_position",
    "loss_curve",
    "mass_by_lag_picture",
    "pattern_picture",
    "save",
    "stack_picture",
    "telling_length",
]
