"""Finding the model of a run folder or of any saved folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_run(run: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a run's folder (its final model) or of a folder that `save_pretrained` wrote.

    Raises:
        FileNotFoundError: there is no model; the message says why.
    """
    import torch
    from transformers import AutoTokenizer

    from pi_attention.models import PiForCausalLM

    folder = run / "model" if (run / "model").is_dir() else run
    if not (folder / "config.json").exists():
        unfinished = " The run has not finished: pi-attention train --resume." if (run / "train.yaml").exists() else ""
        raise FileNotFoundError(f"run={str(run)!r} holds no model.{unfinished}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = PiForCausalLM.from_pretrained(folder).to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder)
