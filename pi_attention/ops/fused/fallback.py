"""What "auto" does where kernels do not compile: it warns, computes by plain PyTorch, and does not try them again."""

from __future__ import annotations

import warnings
from subprocess import CalledProcessError
from typing import Any

import torch
from torch import Tensor

from pi_attention.ops.blocked.attention import blocked_attention
from pi_attention.pattern import PiPattern

FAILED: dict[Any, str] = {}
"""Why kernels failed to compile, by what they were compiled for."""
FAILED_BACKWARD: dict[Any, str] = {}
"""The same of kernels of gradients. Those of the output go on: gradient checkpointing computes it twice, and alike."""


def why_not(query: Tensor) -> str | None:
    """Why kernels for such a query failed to compile; None where none did."""
    return FAILED.get(_compiled_for(query)) if FAILED else None


def has_backward(query: Tensor) -> bool:
    """Whether no kernel of gradients has failed to compile for such a query."""
    return not FAILED_BACKWARD or _compiled_for(query) not in FAILED_BACKWARD


def _compiled_for(query: Tensor) -> Any:
    return query.device, query.dtype, query.shape[3]


def note_failure(query: Tensor, error: Exception, *, backward: bool = False) -> bool:
    """Whether an error is of compiling kernels, and not of running them; if so warn, and keep "auto" off them.

    Args:
        backward: whether they are kernels of gradients.
    """
    made_by_triton = any(kind.__module__.startswith("triton.") for kind in type(error).__mro__)
    words = ("C compiler", "PassManager", "ptxas", "libcuda")  # plain RuntimeErrors and AssertionErrors of Triton
    if not (
        made_by_triton
        or isinstance(error, CalledProcessError | ImportError)
        or (type(error) in (RuntimeError, AssertionError) and any(word in str(error) for word in words))
    ):
        return False
    first = (str(error).strip().splitlines() or [""])[0]
    reason = f"the kernels failed to compile ({type(error).__name__}: {first[:200]})"
    (FAILED_BACKWARD if backward else FAILED)[_compiled_for(query)] = reason
    of = "Gradients of π-Attention run" if backward else "π-Attention runs"
    warnings.warn(
        f"{of} as plain PyTorch on {query.device}, with {query.dtype} and head dim {query.shape[3]}: "
        f'{reason}. impl="triton" shows the whole error.',
        stacklevel=4,
    )
    return True


def blocked_gradients(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    starts: Tensor | None,
    pattern: list[int],
    mass: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of `inputs` by a forward pass of plain PyTorch and its own backward pass.

    Args:
        grads: of the output and of both log-sum-exps, None where one has no gradient.
        inputs: query, key, value, gate logits and sink logit.
    """
    leaves: list[Any] = [None if x is None else x.detach().requires_grad_() for x in inputs]
    query, key, value, gate, sink_logit = leaves
    fusion = "mass" if mass or gate is None else "gate"
    of_scores: Any = {"scale": scale, "sink_logit": sink_logit, "softcap": softcap}
    with torch.autocast(query.device.type, enabled=False):  # as in the forward pass
        with torch.enable_grad():
            outputs = blocked_attention(
                query, key, value, PiPattern.from_ints(pattern), gate=gate, fusion=fusion, starts=starts, **of_scores
            )
        results, given = zip(
            *((y, grad) for y, grad in zip(outputs, grads, strict=True) if grad is not None and y.requires_grad),
            strict=True,
        )
        found = iter(torch.autograd.grad(results, [x for x in leaves if x is not None], given, materialize_grads=True))
    return tuple(None if x is None else next(found) for x in leaves)
