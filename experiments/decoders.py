"""Pretrained decoders of transformers that lie in `data/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.data import need


def _of(name: str, data: Path) -> tuple[Path, dict[str, Any]]:
    """The folder, and what transformers is told of a GGUF file in it."""
    folder = need(data / name, "put a pretrained model of transformers, or a GGUF file of one, there")
    return folder, {"gguf_file": next((path.name for path in folder.glob("*.gguf")), None)}


def tokenizer_of(name: str, data: Path) -> Any:
    """The tokenizer of `data/NAME`."""
    folder, file = _of(name, data)
    return AutoTokenizer.from_pretrained(folder, **file)


def decoder_of(name: str, data: Path) -> Any:
    """The causal language model of `data/NAME`, in transformers' format or as a GGUF file, in fp32 on the CPU."""
    folder, file = _of(name, data)
    return AutoModelForCausalLM.from_pretrained(folder, **file, dtype=torch.float32)
