"""Pretrained models that a command takes: what cannot serve is named before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pi_attention.cli.runs import OURS, SAFELY, need_own_weights
from pi_attention.paths import shown, status_of

HELD_OUT = 0.1
"""Share of a text that a pretrained model is not trained on."""


def training_and_held_out(documents: list[str]) -> tuple[list[str], list[str]]:
    """The two parts of a text, always the same ones, so that models of several conversions are compared on one text."""
    from pi_attention.data.packing import hold_out

    return hold_out(documents, HELD_OUT, seed=0)


def _refusal(model: str, what: str, error: Exception, argument: str) -> ValueError:
    words = " ".join(str(error).split())[:400]
    return ValueError(f"{argument}={shown(model)} {what}: {words}")


def need_decoder(model: str, argument: str = "model") -> Any:
    """The configuration of the text of a pretrained model, which an argument of the command names.

    Raises:
        ValueError: a local path holds no pretrained model of another kind than ours.
    """
    from transformers import AutoConfig

    status = status_of(argument, Path(model)) if len(model) <= 96 or "/" in model else None  # else no name on the hub
    if status is not None and not (Path(model) / "config.json").exists():
        inner = Path(model) / "model"
        hint = f" The run's model is in {shown(inner)}." if (inner / "config.json").exists() else ""
        raise ValueError(
            f"{argument}={shown(model)} holds no config.json: give the hub name of a pretrained model, or a folder "
            f"that save_pretrained wrote.{hint}"
        )
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # transformers and the hub client raise many kinds
        raise _refusal(
            model, "cannot be loaded, give the folder or the hub name of a pretrained model", error, argument
        ) from error
    kind = config.model_type
    if kind in OURS:
        raise ValueError(
            f"{argument}={shown(model)} is a model of π-Attention already ({kind}): give a pretrained one."
        )
    return config.get_text_config()


def load_tokenizer_of(model: str, argument: str = "model") -> Any:
    """The tokenizer that lies beside a pretrained model.

    Raises:
        ValueError: there is none; the message says how to add one.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # as above
        remedy = "has no tokenizer that can be loaded, save one there by tokenizer.save_pretrained"
        raise _refusal(model, remedy, error, argument) from error


def load_decoder(model: str, argument: str = "model") -> Any:
    """The pretrained model in fp32, so that the small steps of a fine-tune are not rounded away.

    Raises:
        ValueError: it cannot be loaded, or lacks weights, which would be drawn at random.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if Path(model).is_dir():
        need_own_weights(Path(model), argument)
    try:
        loaded, found = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, output_loading_info=True, **SAFELY
        )
    except Exception as error:  # as above
        raise _refusal(model, "cannot be loaded as a causal language model", error, argument) from error
    if found["missing_keys"]:
        raise ValueError(
            f"{argument}={shown(model)} lacks weights, such as {sorted(found['missing_keys'])[0]}: give a causal "
            "language model with all of its weights."
        )
    return loaded


def need_positions(model: Any, context: int) -> None:
    """Raise ValueError where a context has more tokens than the positions that a model has learned, as GPT-2 has."""
    from pi_attention.models.inputs import learned_positions

    most = learned_positions(model)
    if most is not None and context > most:
        raise ValueError(f"context={context} is more than the {most} positions that the model has learned: give fewer.")
