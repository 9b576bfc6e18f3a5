"""What the benchmarks measured on a device: its ceilings, and how far above the floor the kernels run there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Measured figures of a GPU (benchmarks/results/gpu-*.json; a test holds them together).

    Args:
        name: as CUDA reports it.
        bytes_per_second: of a large copy, read and written.
        flops_per_second: of a large bf16 matrix product.
        forward_over_floor: time of the operator's forward pass over its floor, at 32,768 tokens and D = 128.
        training_over_floor: the same of forward and backward.
    """

    name: str
    bytes_per_second: float
    flops_per_second: float
    forward_over_floor: float
    training_over_floor: float


DEVICES = {"h200": Device("NVIDIA H200", 4.27e12, 713e12, 3.01, 4.12)}
"""Devices with a committed benchmark, by the name that the command line takes."""
