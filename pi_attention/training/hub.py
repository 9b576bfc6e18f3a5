"""A finished model on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]


def check_hub(repository: str) -> None:
    """Check `push_to_hub` before any work is done: the name, and that somebody is logged in.

    Raises:
        ValueError: the name is none of a repository, or nobody is logged in.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub={repository!r} names no repository: give user/name. {error}") from error
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network
        raise ValueError(
            f"push_to_hub={repository!r} needs a login: hf auth login, or the environment variable HF_TOKEN. {error}"
        ) from error


def push(folder: Path, repository: str) -> str:
    """Upload a model's folder, weights, tokenizer and card, and return its address.

    The repository is made private where it does not exist yet.

    Raises:
        FileNotFoundError: the folder holds no model.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model to push: train it, or convert one, first.")
    hub = HfApi()
    url = hub.create_repo(repository, private=True, exist_ok=True)
    hub.upload_folder(
        repo_id=url.repo_id,
        folder_path=folder,
        commit_message="Model trained by pi-attention",
        allow_patterns=["*.json", "*.safetensors", "*.md", "*.png", "*.txt", "*.model", "*.jinja"],
    )
    return str(url)
