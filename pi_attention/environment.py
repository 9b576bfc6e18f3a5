"""What runs here: versions, device, and the implementation that `impl="auto"` takes on it. An issue should quote it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import pi_attention
from pi_attention.accelerator import best_device
from pi_attention.ops.fused.attention import why_not_auto

PACKAGES = ("triton", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "peft", "numpy")
VARIABLES = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "PYTORCH_ENABLE_MPS_FALLBACK")
"""Environment variables that change what is chosen; told where they are set."""


def describe_environment() -> dict[str, str]:
    """What an issue should quote, by its name, in the order in which to print it."""
    device = best_device()
    found = {
        "pi-attention": pi_attention.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "torch": torch.__version__ + _toolkit(),
    }
    found |= {name: _version(name) for name in PACKAGES}
    found |= {"device": _device_in_words(device), "cpu threads": str(torch.get_num_threads())}
    found |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return found | {'impl="auto" takes': _choice(device)}


def environment_text() -> str:
    """The environment, a line for each fact."""
    facts = describe_environment()
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _toolkit() -> str:
    for name, of_torch in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)):
        if of_torch is not None:
            return f" ({name} {of_torch})"
    return ""


def _device_in_words(device: torch.device) -> str:
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        count = torch.cuda.device_count()
        made_for = "" if torch.version.hip else f", compute capability {gpu.major}.{gpu.minor}"
        return f"{count} × {gpu.name}{made_for}, {gpu.total_memory / 2**30:.0f} GiB"
    if device.type == "cpu":
        return f"no accelerator; CPU {platform.machine()}"
    return f"{torch.accelerator.device_count()} × {device.type}"


def _choice(device: torch.device) -> str:
    """The implementation of a usual call, 16 bits and 64 features a head, and why."""
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    reason = why_not_auto(torch.empty(1, 1, 1, 64, device=device, dtype=dtype))
    return "triton, the fused kernels" if reason is None else f"blocked, plain PyTorch: {reason}"
