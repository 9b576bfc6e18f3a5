"""What the server needs: packages of the extra, and a transformers whose private interfaces are known."""

from __future__ import annotations

from importlib.util import find_spec

from pi_attention.models.continuous import need_known_version

PACKAGES = ("fastapi", "openai", "uvicorn")
"""Of the extra `serve`, those that transformers' server asks for."""


def need_server() -> None:
    """Raise where the server cannot run.

    Raises:
        ValueError: a package is missing.
        NotImplementedError: another transformers is installed than those that were tested.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(f"serve needs the package {missing[0]}: pip install 'pi-attention[serve]'.")
    need_known_version()
