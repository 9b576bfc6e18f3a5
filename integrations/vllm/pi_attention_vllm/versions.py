"""With which vLLM the package was tested; its interfaces are internal, and change with each minor version."""

KNOWN = ("0.32",)
"""Minor versions."""


def is_known() -> bool:
    """Whether the installed vLLM is one that was tested."""
    from vllm import __version__

    return ".".join(__version__.split(".")[:2]) in KNOWN


def need_known_version() -> None:
    """Refuse a vLLM that was not tested.

    Raises:
        NotImplementedError: the version is not one of `KNOWN`.
    """
    from vllm import __version__

    if not is_known():
        raise NotImplementedError(
            f"pi-attention-vllm is tested with vLLM {', '.join(KNOWN)}, and {__version__} is installed: "
            "install that one."
        )
