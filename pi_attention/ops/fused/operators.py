"""The fused kernels as registered PyTorch operators: schema, fake tensors, autograd.

This file needs torch alone, so that the operators are registered before anything is traced; kernels load when run.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from pi_attention.ops.checks import check_softcap
from pi_attention.ops.fused.fallback import blocked_gradients, has_backward, note_failure
from pi_attention.ops.fused.layout import by_token, dense_strides
from pi_attention.pattern import PiPattern

# Defined without torch.library.custom_op or register_autograd, which cost each call some 50 µs more.
torch.library.define(
    "pi_attention::fused",
    "(Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? starts, int[] pattern, bool mass, "
    "float scale, Tensor? sink_logit=None, float? softcap=None) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "pi_attention::fused_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor? grad_skip_lse, Tensor query, Tensor key, Tensor value, Tensor? gate, "
    "Tensor? starts, Tensor out, Tensor lse, Tensor skip_out, Tensor skip_lse, int[] pattern, bool mass, "
    "float scale, Tensor? sink_logit=None, float? softcap=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
fused = torch.ops.pi_attention.fused.default
fused_backward = torch.ops.pi_attention.fused_backward.default


@cache
def _launchers() -> tuple[Any, Any, Any]:
    """The files that need Triton, loaded by the first call. (An import statement takes 0.5 µs of every call.)"""
    import pi_attention.ops.fused.decoding as decoding
    import pi_attention.ops.fused.launch as launch
    import pi_attention.ops.fused.tiling as tiling

    return decoding, launch, tiling


def run_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    starts: Tensor | None,
    pattern: list[int],
    mass: bool,
    scale: float,
    sink_logit: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and log-sum-exp, then those of the skip band (empty tensors without one).

    The log-sum-exps are of the scores alone; a sink logit [H] has its share of the output only. The soft cap of a
    compiled graph is checked here.
    """
    _, launch, tiling = _launchers()
    shape = PiPattern.from_ints(pattern)
    softcap = check_softcap(softcap)
    problem = tiling.problem_of(query, key, value, gate, starts, shape, mass, scale, sink_logit, softcap)
    out, lse, skip_out, skip_lse = launch.run_forward(query, key, value, gate, starts, sink_logit, problem)
    if skip_out is None or skip_lse is None:
        return out, lse, out.new_empty(0), lse.new_empty(0)
    return out, lse, skip_out, skip_lse


torch.library.impl("pi_attention::fused", ("cpu", "cuda"), run_fused)


def _fake_result(x: Tensor, as_it_lies: bool = True) -> Tensor:
    return x.new_empty_strided(x.shape, dense_strides(x.shape, as_it_lies and by_token(x.stride())))


@torch.library.register_fake("pi_attention::fused")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    starts: Tensor | None,
    pattern: list[int],
    mass: bool,
    scale: float,
    sink_logit: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _fake_result(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if PiPattern.from_ints(pattern).skips == 0:
        return out, lse, out.new_empty(0), lse.new_empty(0)
    return out, lse, query.new_empty(query.shape), torch.empty_like(lse)


def run_fused_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_skip_lse: Tensor | None,
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
    mass: bool,
    scale: float,
    sink_logit: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, gate logits and sink logit, in their dtypes; None without one of the last two."""
    _, launch, tiling = _launchers()
    shape = PiPattern.from_ints(pattern)
    problem = tiling.problem_of(query, key, value, gate, starts, shape, mass, scale, sink_logit, softcap)
    skip = (skip_out, skip_lse) if problem.both else (None, None)
    grads = (grad_out, grad_lse, grad_skip_lse if problem.both else None)
    saved = launch.Saved(out, lse, *skip)
    return launch.run_backward(grads, query, key, value, gate, starts, sink_logit, saved, problem)


def _run_or_replace(*arguments: Any) -> tuple[Tensor | None, ...]:
    """`run_fused_backward`, or plain PyTorch where its kernels do not compile: that is warned of once."""
    query, key, value, gate, starts = arguments[3:8]
    if has_backward(query):
        try:
            return run_fused_backward(*arguments)
        except Exception as error:
            if not note_failure(query, error, backward=True):
                raise
    pattern, mass, scale, sink_logit, softcap = arguments[12:]
    inputs = (query, key, value, gate, sink_logit)
    return blocked_gradients(arguments[:3], inputs, starts, pattern, mass, scale, softcap)


def _fused_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The same; empty tensors without gate logits or sink logit."""
    return tuple(arguments[0].new_empty(0) if x is None else x for x in run_fused_backward(*arguments))


torch.library.impl("pi_attention::fused_backward", ("cpu", "cuda"), _fused_backward)


@torch.library.register_fake("pi_attention::fused_backward")
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_skip_lse: Tensor | None,
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
    mass: bool,
    scale: float,
    sink_logit: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    none = grad_out.new_empty(0)
    grad_gate = none if gate is None else lse.new_empty(lse.shape, dtype=gate.dtype)
    grad_sink = grad_out.new_empty(0) if sink_logit is None else sink_logit.new_empty(sink_logit.shape)
    as_they_lie = PiPattern.from_ints(pattern).skips == 0
    grad_query, grad_key, grad_value = (_fake_result(x, as_they_lie) for x in (query, key, value))
    return grad_query, grad_key, grad_value, grad_gate, grad_sink


def is_plain(*tensors: Tensor) -> bool:
    """Whether a call needs no dispatcher, which takes 30 µs of an eager call: plain tensors, nobody who listens."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return {*map(type, tensors)} == {Tensor}


class Fused(torch.autograd.Function):
    """`fused` with its gradients; traced through by torch.compile, which leaves the operators opaque.

    `beside` are gate logits that fuse nothing: they get a gradient of zeros.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None,
        starts: Tensor | None,
        pattern: list[int],
        mass: bool,
        scale: float,
        sink_logit: Tensor | None = None,
        softcap: float | None = None,
        replaceable: bool = False,
        beside: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        call = run_fused if is_plain(query, key, value) else fused
        outputs = call(query, key, value, gate, starts, pattern, mass, scale, sink_logit, softcap)
        ctx.save_for_backward(query, key, value, gate, starts, *outputs, sink_logit)
        ctx.beside = None if beside is None else (beside.shape, beside.dtype)
        ctx.rest = (pattern, mass, scale, softcap)
        ctx.replaceable = replaceable
        ctx.mark_non_differentiable(outputs[2])
        if not torch.compiler.is_compiling():  # which knows no gradient that is left out
            ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Any, grad_skip_lse: Tensor | None
    ) -> tuple[Any, ...]:
        *saved, sink_logit = ctx.saved_tensors
        query, gate = saved[0], saved[3]
        *rest, softcap = ctx.rest
        if grad_out is None:
            grad_out = torch.zeros_like(query)
        differentiate: Any = fused_backward
        if is_plain(grad_out, query):
            differentiate = _run_or_replace if ctx.replaceable else run_fused_backward
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():  # create_graph=True
            differentiate = FusedBackward.apply
        arguments = grad_out, grad_lse, grad_skip_lse, *saved, *rest, sink_logit, softcap
        *grads, grad_gate, grad_sink = differentiate(*arguments)
        grad_gate = None if gate is None else grad_gate
        grad_sink = None if sink_logit is None else grad_sink
        nothing = None
        if ctx.beside is not None and ctx.needs_input_grad[11]:
            shape, dtype = ctx.beside
            nothing = query.new_zeros(shape, dtype=dtype)
        return *grads, grad_gate, None, None, None, None, grad_sink, None, None, nothing


class FusedBackward(torch.autograd.Function):
    """`fused_backward`, whose own gradients are refused."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return fused_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError('impl="triton" has no double backward: use impl="blocked" for second derivatives.')


torch.library.define(
    "pi_attention::decode",
    "(Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? starts, int[] pattern, bool mass, float scale, "
    "Tensor? sink_logit=None, float? softcap=None) -> (Tensor, Tensor, Tensor)",
)
decode = torch.ops.pi_attention.decode.default


def run_decoding(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    starts: Tensor | None,
    pattern: list[int],
    mass: bool,
    scale: float,
    sink_logit: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, T, D] of the fused bands; log-sum-exps [B, H, T] of the local band with sinks, of the skip band."""
    decoding, _, tiling = _launchers()
    shape = PiPattern.from_ints(pattern)
    softcap = check_softcap(softcap)
    problem = tiling.problem_of(query, key, value, gate, starts, shape, mass, scale, sink_logit, softcap)
    return decoding.run_decode(query, key, value, gate, starts, sink_logit, problem)


torch.library.impl("pi_attention::decode", ("cpu", "cuda"), run_decoding)


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
    sink_logit: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return query.new_empty(query.shape), lse, torch.empty_like(lse)
