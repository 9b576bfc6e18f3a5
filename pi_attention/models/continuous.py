"""With which transformers, and for which models, continuous batching computes π-Attention; others are refused."""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers import GenerationMixin
from transformers import __version__ as INSTALLED

REFUSAL = "continuous batching serves models of convert(...) and PiForCausalLM alone: convert it, or use generate."
KNOWN = ("5.23",)
"""Minor versions of transformers whose continuous batching was tested; its interfaces are private, and change."""


def need_known_version() -> None:
    """Refuse continuous batching with a transformers that was not tested.

    Raises:
        NotImplementedError: the version is not one of `KNOWN`.
    """
    if ".".join(INSTALLED.split(".")[:2]) not in KNOWN:
        raise NotImplementedError(
            f"continuous batching of π-Attention is tested with transformers {', '.join(KNOWN)}, and "
            f"{INSTALLED} is installed: install that one, or use generate with a left-padded batch."
        )


def refuse_continuous_batching(name: str) -> None:
    """Let every model whose attention is called `name` refuse continuous batching.

    transformers takes flash attention, where it is installed, in the place of any implementation that is none of its
    own: dense attention with a line in the log. Models of ours refuse by a method; this is for those that only name us.
    """
    owner: Any = next((kind for kind in GenerationMixin.__mro__ if "init_continuous_batching" in vars(kind)), None)
    if owner is None or hasattr(owner.init_continuous_batching, "refuses"):
        return
    usual = owner.init_continuous_batching

    @wraps(usual)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.config.get_text_config(), "_attn_implementation", None) == name:
            raise NotImplementedError(f'attn_implementation="{name}": {REFUSAL}')
        return usual(self, *args, **kwargs)

    checked.refuses = name  # type: ignore[attr-defined]
    owner.init_continuous_batching = checked
