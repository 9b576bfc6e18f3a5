"""The device that work runs on where the user names none, and what it can do."""

from __future__ import annotations

import torch


def best_device() -> torch.device:
    """The accelerator of this machine (CUDA, ROCm, XPU, MPS …) as PyTorch finds it, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16 itself, without emulation; False for the CPU, or where PyTorch is silent."""
    supported = getattr(getattr(torch, device.type, None), "is_bf16_supported", None)
    return device.type != "cpu" and supported is not None and bool(supported(including_emulation=False))
