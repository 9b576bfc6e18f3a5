"""Finding the model of a run folder or of any saved folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def model_folder(run: Path) -> Path:
    """The folder with the model of a run, or `run` itself where `save_pretrained` wrote it.

    Raises:
        FileNotFoundError: there is no model; the message says why.
    """
    folder = run / "model" if (run / "model").is_dir() else run
    if not (folder / "config.json").exists():
        unfinished = " The run has not finished: pi-attention train --resume." if (run / "train.yaml").exists() else ""
        wanted = "" if unfinished else " Name the folder of a training run, or one that save_pretrained wrote."
        raise FileNotFoundError(f"run={str(run)!r} holds no model.{unfinished}{wanted}")
    return folder


def load_run(run: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a run's folder, or of a folder that `save_pretrained` wrote; see `model_folder`."""
    folder = model_folder(run)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import pi_attention.convert  # noqa: F401  registers our models

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder)
