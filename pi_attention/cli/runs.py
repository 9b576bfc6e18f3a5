"""Finding the model of a run folder or of any saved folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pi_attention.paths import need_file, status_of

SAFELY: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
"""How weights of a stranger are loaded: no pickle is read, and no code of theirs runs."""


OURS = "pi", "pi_converted"
"""Kinds of models that are ours."""


def model_folder(run: Path) -> Path:
    """The folder with the model of a run, or `run` itself where `save_pretrained` wrote it.

    Raises:
        FileNotFoundError: there is no model; the message says why.
    """
    status_of("run", run)
    folder = run / "model" if (run / "model").is_dir() else run
    if status_of("run", folder / "config.json") is None:
        unfinished = ""
        if (run / "train.yaml").exists():
            unfinished = f" The run has not finished: pi-attention train --out {run} --resume."
        wanted = "" if unfinished else " Name the folder of a training run, or one that save_pretrained wrote."
        raise FileNotFoundError(f"run={str(run)!r} holds no model.{unfinished}{wanted}")
    return folder


def load_run(run: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a run's folder, or of a folder that `save_pretrained` wrote; see `model_folder`."""
    folder = model_folder(run)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import pi_attention.convert  # noqa: F401  registers our models
    from pi_attention.accelerator import best_device

    need_ours(run, OURS)
    need_own_weights(run)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **SAFELY)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers, safetensors and tokenizers raise many kinds
        raise ValueError(f"run={str(run)!r} holds a model that cannot be loaded: {error}") from error
    if found["missing_keys"]:
        raise ValueError(
            f"run={str(run)!r} lacks weights of its model, such as {sorted(found['missing_keys'])[0]}: save it again."
        )
    return model.to(best_device()).eval(), tokenizer


def need_own_weights(run: Path, argument: str = "run") -> None:
    """Raise ValueError where the index of a model's weights names files outside of its folder."""
    folder = model_folder(run)
    for index in folder.glob("*.safetensors.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{argument}={str(run)!r} has a {index.name} that cannot be read: {error}") from error
        strange = sorted(str(name) for name in names if Path(str(name)).name != name)
        if strange:
            raise ValueError(
                f"{argument}={str(run)!r} has a {index.name} that names {strange[0]!r}: weights lie in its folder."
            )


def kind_of(run: Path) -> Any:
    """`model_type` of the configuration of a run's model.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: its configuration cannot be read.
    """
    file = model_folder(run) / "config.json"
    need_file("run", file, "a folder that save_pretrained wrote")
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"run={str(run)!r} has a config.json that cannot be read: {error}") from error


def need_ours(run: Path, kinds: tuple[str, ...]) -> None:
    """Raise ValueError unless the model of a run is of one of these kinds."""
    kind = kind_of(run)
    if kind not in kinds:
        remedy = " Convert it first: pi-attention convert." if kind not in OURS else ""
        raise ValueError(f"run={str(run)!r} holds a model of the kind {kind!r}, not {' or '.join(kinds)}.{remedy}")


def opening(run: Path, tokenizer: Any, tokens: int = 64) -> str:
    """What a text of the run's own kind begins with: the prompt of its sample, or a line break where there is none."""
    sample = run / "sample.txt"
    if not sample.exists():
        return "\n"
    ids = tokenizer(sample.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids[:tokens], skip_special_tokens=True).rstrip("\ufffd") or "\n"


def known_context(config: Any) -> int:
    """Tokens that a model was trained or extended for."""
    extended: int | None = getattr(config, "extend_to", None)
    return extended or int(config.get_text_config().max_position_embeddings)
