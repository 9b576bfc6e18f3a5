"""π-Attention by the fused kernels: what they can serve, and which of their operators a call takes."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pi_attention.ops.fused.fallback import why_not
from pi_attention.ops.fused.operators import Fused, decode, fused, is_plain, run_decoding, run_fused
from pi_attention.ops.transforms import transforming
from pi_attention.pattern import PiPattern

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off")


def why_not_triton(query: Tensor) -> str | None:
    """Why the kernels cannot serve a call with this query; None when they can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if not query.is_cuda and not INTERPRETED:
        return f"the tensors are on {query.device}, and Triton needs a GPU (or TRITON_INTERPRET=1)"
    if transforming():
        return "forward mode and the transforms of torch.func are asked for, and the kernels have reverse mode alone"
    if query.dtype == torch.bfloat16 and (not query.is_cuda or INTERPRETED):
        return "Triton's interpreter computes products of bfloat16 wrongly; take float16 or float32"
    if query.dtype == torch.float64:
        return "the kernels compute in fp32, and the tensors are float64"
    if query.shape[3] > 256:
        return f"head dim {query.shape[3]} is larger than 256"
    return None


UNTRIED = {
    "cpu": "the tensors are on the CPU",
    "mps": "the tensors are on an Apple GPU (MPS), and Triton has no compiler for it",
    "xpu": "the tensors are on an Intel GPU (XPU), and the kernels are registered for CUDA alone",
}


def why_not_auto(query: Tensor) -> str | None:
    """Why "auto" does not take the kernels: they cannot serve the call, or are untried on its device; else None."""
    if not query.is_cuda:
        return UNTRIED.get(query.device.type, f"the tensors are on {query.device}, where the kernels are untried")
    if torch.version.hip is not None:
        return 'the kernels are untested on AMD GPUs (ROCm): impl="triton" tries them'
    return why_not_triton(query) or (why_not(query))


MAX_QUERIES = 16
MAX_ROWS = 64
"""Query rows of a program: the heads of a group times the queries."""


def is_decoding(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    pattern: PiPattern,
    sink_logit: Tensor | None = None,
) -> bool:
    """Whether the decoding kernels serve this call: few causal queries, and nothing to differentiate."""
    differentiable = query.requires_grad or key.requires_grad or value.requires_grad
    differentiable = differentiable or (gate is not None and gate.requires_grad)
    differentiable = differentiable or (sink_logit is not None and sink_logit.requires_grad)
    if not pattern.causal or (differentiable and torch.is_grad_enabled()):
        return False
    tokens: Any = query.shape[2]
    few = tokens <= min(MAX_QUERIES, MAX_ROWS * key.shape[1] // query.shape[1])
    if isinstance(few, torch.SymBool):  # exported for any length, which other kernels serve
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy

        return statically_known_true(few)
    return bool(few)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: PiPattern,
    *,
    gate: Tensor | None,
    fusion: str,
    starts: Tensor | None,
    scale: float,
    sink_logit: Tensor | None = None,
    softcap: float | None = None,
    replaceable: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, T, D], lse_local and lse_skip [B, H, T]; arguments as in `pi_attention`.

    Args:
        replaceable: whether plain PyTorch may compute the gradients if their kernels do not compile.
    """
    if scale <= 0:  # the kernels' running maximum takes a positive one
        query, scale = query * scale, 1.0
    code = pattern.to_ints() if torch.compiler.is_compiling() else _ints_of(pattern)  # Dynamo looks through caches
    mass = fusion == "mass"
    attend: Any
    if is_decoding(query, key, value, gate, pattern, sink_logit):
        attend = run_decoding if is_plain(query, key, value) else decode
        return attend(query, key, value, gate, starts, code, mass, scale, sink_logit, softcap)
    beside = None
    if pattern.skips == 0:
        beside, gate, mass = gate, None, False
    if torch.compiler.is_compiling():  # Dynamo traces no autograd function to which one tensor is given twice
        key = key.view_as(key) if key is query else key
        value = value.view_as(value) if value is query or value is key else value
    differentiable = torch.is_grad_enabled()
    attend = Fused.apply if differentiable else run_fused if is_plain(query, key, value) else fused
    more: tuple[Any, ...] = () if sink_logit is None and softcap is None else (sink_logit, softcap)
    if differentiable and (replaceable or beside is not None):
        more = sink_logit, softcap, replaceable, beside
    out, lse, _, lse_skip = attend(query, key, value, gate, starts, code, mass, scale, *more)
    return out, lse, torch.full_like(lse, -torch.inf) if pattern.skips == 0 else lse_skip


def paged_decoding(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    longest: int,
    pattern: PiPattern,
    *,
    gate: Tensor | None,
    mass: bool,
    scale: float,
    sink_logit: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """out [N, H, T, D] of N requests whose keys a table finds among the slots [slots, G, D]; see `ops.paged`."""
    from pi_attention.ops.fused.decoding import run_decode
    from pi_attention.ops.fused.tiling import problem_of

    if scale <= 0:
        query, scale = query * scale, 1.0
    keys, values = (x.transpose(0, 1)[None].expand(len(query), -1, -1, -1) for x in (key, value))
    problem = problem_of(query, keys, values, gate, None, pattern, mass, scale, sink_logit, softcap)
    problem = problem._replace(key=(*keys.shape[:2], longest, keys.shape[3]), paged=True)
    return run_decode(query, keys, values, gate, table, sink_logit, problem)[0]


@lru_cache(maxsize=256)
def _ints_of(pattern: PiPattern) -> list[int]:
    return pattern.to_ints()
