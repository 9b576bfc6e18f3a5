"""The Triton implementation as registered PyTorch operators, and π-Attention made of them.

This file needs torch alone, so that the operators are registered before anything is traced; kernels load when run.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pi_attention.ops.blocked import join_sinks
from pi_attention.ops.decoding import decode, is_decoding
from pi_attention.ops.functional import transforming
from pi_attention.ops.fusion import fuse, gate_values
from pi_attention.pattern import PiPattern

BOTH, LOCAL, SKIP = 0, 1, 2
HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off")


def why_not_triton(query: Tensor) -> str | None:
    """Why the kernels cannot serve a call with this query; None when they can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if not query.is_cuda:
        from triton import knobs

        if not knobs.runtime.interpret:
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


# Defined without torch.library.custom_op, which costs a call of each operator some 50 µs more.
torch.library.define(
    "pi_attention::fused",
    "(Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? starts, int[] pattern, int bands, bool mass, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "pi_attention::fused_backward",
    "(Tensor grad_out, Tensor grad_lse, Tensor grad_skip_lse, Tensor query, Tensor key, Tensor value, Tensor? gate, "
    "Tensor? starts, Tensor out, Tensor lse, Tensor skip_out, Tensor skip_lse, int[] pattern, int bands, bool mass, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)
fused = torch.ops.pi_attention.fused.default
fused_backward = torch.ops.pi_attention.fused_backward.default


@torch.library.impl("pi_attention::fused", ("cpu", "cuda"))
def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    starts: Tensor | None,
    pattern: list[int],
    bands: int,
    mass: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, log-sum-exp, and for both bands the skip band's output and log-sum-exp (else empty tensors)."""
    from pi_attention.ops.triton.launch import launch_forward
    from pi_attention.ops.triton.plan import Launch

    shape = PiPattern.from_ints(pattern)
    if bands != BOTH:
        out, lse = launch_forward(Launch(query, key, value, starts, shape, bands == SKIP, scale))
        return out, lse, out.new_empty(0), lse.new_empty(0)
    skip = launch_forward(Launch(query, key, value, starts, shape, True, scale))
    out, lse = launch_forward(Launch(query, key, value, starts, shape, False, scale), skip, gate, mass)
    return out, lse, *skip


@torch.library.register_fake("pi_attention::fused")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    starts: Tensor | None,
    pattern: list[int],
    bands: int,
    mass: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if bands != BOTH:
        return out, lse, out.new_empty(0), lse.new_empty(0)
    return out, lse, torch.empty_like(out), torch.empty_like(lse)


@torch.library.impl("pi_attention::fused_backward", ("cpu", "cuda"))
def _fused_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    grad_skip_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    starts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    skip_out: Tensor,
    skip_lse: Tensor,
    pattern: list[int],
    bands: int,
    mass: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and gate logits (fp32; empty without a gate)."""
    from pi_attention.ops.triton.launch import Saved, launch_backward_key, launch_backward_query, launch_row_terms
    from pi_attention.ops.triton.plan import Launch, has_periods

    shape = PiPattern.from_ints(pattern)
    both = bands == BOTH
    saved = Saved(out, lse, skip_out if both else None, skip_lse if both else None)
    several = has_periods(shape) and query.shape[1] != key.shape[1]  # launches that add to one gradient
    key_dtype = torch.float32 if several else key.dtype
    grads = (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(key.shape, dtype=key_dtype, device=key.device),
        torch.empty(value.shape, dtype=key_dtype, device=value.device),
    )
    terms, grad_gate = launch_row_terms(saved, grad_out, grad_lse, grad_skip_lse, gate, mass)
    work = []
    if bands != LOCAL:
        work.append((Launch(query, key, value, starts, shape, True, scale), skip_lse if both else lse, terms[-2:]))
    if bands != SKIP:
        work.append((Launch(query, key, value, starts, shape, False, scale), lse, terms[:2]))
    for number, (launch, band_lse, band_terms) in enumerate(work):
        launch_backward_query(launch, grad_out, band_lse, band_terms, grads[0], add=number > 0)
        launch_backward_key(launch, grad_out, band_lse, band_terms, grads[1:], add=number > 0)
    if grad_gate is None:
        grad_gate = lse.new_empty(0)
    return grads[0], grads[1].to(key.dtype), grads[2].to(value.dtype), grad_gate


@torch.library.register_fake("pi_attention::fused_backward")
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    grad_skip_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    starts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    skip_out: Tensor,
    skip_lse: Tensor,
    pattern: list[int],
    bands: int,
    mass: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_gate = lse.new_empty(0 if gate is None else lse.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), grad_gate


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, gate, starts, ctx.pattern, ctx.bands, ctx.mass, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, gate, starts, *output)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(True)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor, _: Any, grad_skip_lse: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    *grads, grad_gate = fused_backward(
        grad_out, grad_lse, grad_skip_lse, *saved, ctx.pattern, ctx.bands, ctx.mass, ctx.scale
    )
    gate = saved[3]
    return *grads, None if gate is None else grad_gate.to(gate.dtype), None, None, None, None, None


torch.library.register_autograd("pi_attention::fused", _differentiate, setup_context=_save)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError('impl="triton" has no double backward: use impl="blocked" for second derivatives.')


torch.library.register_autograd("pi_attention::fused_backward", _refuse)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, T, D], lse_local and lse_skip [B, H, T]; arguments as in `pi_attention`."""
    if scale <= 0:  # the kernels' running maximum takes a positive one
        query, scale = query * scale, 1.0
    code = pattern.to_ints()
    if is_decoding(query, key, value, gate, pattern):
        return decode(query, key, value, gate, starts, code, fusion == "mass", scale)
    if not pattern.sinks:
        if pattern.skips == 0:
            out, lse, _, _ = fused(query, key, value, None, starts, code, LOCAL, False, scale)
            return out, lse, torch.full_like(lse, -torch.inf)
        out, lse, _, lse_skip = fused(query, key, value, gate, starts, code, BOTH, fusion == "mass", scale)
        return out, lse, lse_skip
    # Sinks, few keys a query, are joined to the local band outside of the kernels.
    local, lse, _, _ = fused(query, key, value, None, starts, code, LOCAL, False, scale)
    local, lse = join_sinks(local.float(), lse, query, key, value, starts, pattern, scale)
    if pattern.skips == 0:
        return local.to(query.dtype), lse, torch.full_like(lse, -torch.inf)
    skip, lse_skip, _, _ = fused(query, key, value, None, starts, code, SKIP, False, scale)
    weight = gate_values(lse, lse_skip, gate, fusion)
    return fuse(local, skip.float(), weight).to(query.dtype), lse, lse_skip
