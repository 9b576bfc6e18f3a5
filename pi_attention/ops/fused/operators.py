"""The fused kernels as registered PyTorch operators: schema, fake tensors, autograd.

This file needs torch alone, so that the operators are registered before anything is traced; kernels load when run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pi_attention.pattern import PiPattern

BOTH, LOCAL, SKIP = 0, 1, 2

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
    from pi_attention.ops.fused.launch import launch_forward
    from pi_attention.ops.fused.tiling import Launch

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
    from pi_attention.ops.fused.launch import Saved, launch_backward_key, launch_backward_query, launch_row_terms
    from pi_attention.ops.fused.tiling import Launch

    shape = PiPattern.from_ints(pattern)
    both = bands == BOTH
    saved = Saved(out, lse, skip_out if both else None, skip_lse if both else None)
    grad_query, grad_key, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    terms, grad_gate = launch_row_terms(saved, grad_out, grad_lse, grad_skip_lse, gate, mass)
    work = []
    if bands != LOCAL:
        work.append((Launch(query, key, value, starts, shape, True, scale), skip_lse if both else lse, terms[-2:]))
    if bands != SKIP:
        work.append((Launch(query, key, value, starts, shape, False, scale), lse, terms[:2]))
    for number, (launch, band_lse, band_terms) in enumerate(work):
        launch_backward_query(launch, grad_out, band_lse, band_terms, grad_query, add=number > 0)
        launch_backward_key(launch, grad_out, band_lse, band_terms, (grad_key, grad_value), add=number > 0)
    if grad_gate is None:
        grad_gate = lse.new_empty(0)
    return grad_query, grad_key, grad_value, grad_gate


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


torch.library.define(
    "pi_attention::decode",
    "(Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? starts, int[] pattern, bool mass, float scale) "
    "-> (Tensor, Tensor, Tensor)",
)
decode = torch.ops.pi_attention.decode.default


@torch.library.impl("pi_attention::decode", ("cpu", "cuda"))
def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    starts: Tensor | None,
    pattern: list[int],
    mass: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, T, D] of the fused bands; log-sum-exps [B, H, T] of the local band with sinks, of the skip band."""
    from pi_attention.ops.fused.launch import launch_decode
    from pi_attention.ops.fused.tiling import Launch

    return launch_decode(Launch(query, key, value, starts, PiPattern.from_ints(pattern), True, scale), gate, mass)


@torch.library.register_fake("pi_attention::decode")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    starts: Tensor | None,
    pattern: list[int],
    mass: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return query.new_empty(query.shape), lse, torch.empty_like(lse)
