"""The public operator: arguments, choice of the implementation, results. No arithmetic here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from pi_attention.ops.blocked.attention import blocked_attention
from pi_attention.ops.checks import (
    check_arguments,
    check_scale,
    check_sink_logit,
    check_softcap,
    refuse_context_parallel,
)
from pi_attention.ops.dense import covers_everything, dense_attention, needs_mask
from pi_attention.ops.fused.attention import fused_attention, why_not_auto, why_not_triton
from pi_attention.ops.fused.fallback import note_failure
from pi_attention.ops.fusion import beside_gate, gate_values
from pi_attention.ops.transforms import transforming
from pi_attention.pattern import PiPattern
from pi_attention.segments import segment_starts

CASTS = (torch.float16, torch.bfloat16, torch.float32)
log = logging.getLogger("pi_attention")

Fusion = Literal["gate", "mass"]
Impl = Literal["auto", "reference", "blocked", "triton"]
IMPLEMENTATIONS = ("auto", "reference", "blocked", "triton")


class PiAux(NamedTuple):
    """What `return_aux=True` returns beside the output; all [B, H, T], fp32 (fp64 for fp64 inputs)."""

    lse_local: Tensor
    """Log-sum-exp of the local band's scaled (and capped) scores, without a sink logit; −inf for a padding query."""
    lse_skip: Tensor
    """Log-sum-exp of the skip band's scores, likewise; −inf where a query has no skip key."""
    gate: Tensor
    """The weight g of the local band against the skip band, in [0, 1]; 1 where a query has no skip key."""


@overload
def pi_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: PiPattern,
    *,
    gate: Tensor | None = ...,
    fusion: Fusion = ...,
    segment_ids: Tensor | None = ...,
    scale: float | None = ...,
    sink_logit: Tensor | None = ...,
    softcap: float | None = ...,
    return_aux: Literal[False] = ...,
    impl: Impl = ...,
) -> Tensor: ...


@overload
def pi_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: PiPattern,
    *,
    gate: Tensor | None = ...,
    fusion: Fusion = ...,
    segment_ids: Tensor | None = ...,
    scale: float | None = ...,
    sink_logit: Tensor | None = ...,
    softcap: float | None = ...,
    return_aux: Literal[True],
    impl: Impl = ...,
) -> tuple[Tensor, PiAux]: ...


def pi_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: PiPattern,
    *,
    gate: Tensor | None = None,
    fusion: Fusion = "gate",
    segment_ids: Tensor | None = None,
    scale: float | None = None,
    sink_logit: Tensor | None = None,
    softcap: float | None = None,
    return_aux: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, PiAux]:
    """π-Attention (arXiv 2511.10696): a ring-local band and a periodic skip band, fused by a gate per token and head.

    With ℓ, λ the output and log-sum-exp of softmax attention over the local band and s, μ those of the skip band::

        out = g·ℓ + (1 − g)·s        g = sigmoid(a)            fusion="gate": the paper's dynamic fusion gate
                                     g = sigmoid(λ − μ + a)    fusion="mass": a = 0 is one softmax over both bands

    With a sink logit z of the head, a softmax has a term exp(z) in its denominator that has no value. In "mass" it is
    the one softmax, exp(λ + a) + exp(μ) + exp(z); in "gate" each band's own, exp(λ) + exp(z) and exp(μ) + exp(z).

    Under torch.autocast tensors of fp16, bf16 and fp32 are cast to its dtype first, as those of SDPA are.

    A query without skip keys (early in its segment) gets ℓ; a padding query gets 0. All gradients are then 0, not NaN.

    Args:
        query: [B, H, T, D], fp16, bf16, fp32 or fp64, any strides. Query i is at position S − T + i.
        key: [B, G, S, D] with G dividing H (grouped-query attention) and S ≥ T.
        value: like key.
        pattern: which keys each query sees.
        gate: logits a, [B, H, T], any floating dtype. None is fusion="mass" with a = 0.
        fusion: "gate" or "mass", as above.
        segment_ids: [B, S] int32. A query sees only keys of its own segment, a contiguous run of equal ids; negative
            ids are padding. See `segments_from_mask` and `segments_from_cu_seqlens`.
        scale: factor of the scores; 1/√D when None.
        sink_logit: [H], any floating dtype, as in gpt-oss; −inf is no term. A query without keys still gets 0.
        softcap: scores are cap·tanh(scaled score / cap), as in Gemma 2; None leaves them as they are.
        return_aux: also return a `PiAux` of log-sum-exps and gate weights; gradients flow through them.
        impl: "reference" (dense masks, O(T·S) memory), "blocked" (plain PyTorch, linear), "triton" (fused kernels), or
            "auto". An explicit choice never falls back to another.

    Returns:
        out [B, H, T, D] in the dtype of query, and with `return_aux` the pair (out, PiAux). By the fused kernels of
        whole sequences, out lies in memory as the query does: token by token, or head by head.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and the remedy.
        NotImplementedError: the implementation that `impl` names cannot serve this call; the message says why.
        RuntimeError: PyTorch's own `context_parallel` is active.
    """
    if _under_autocast(query):
        options: Any = {"gate": gate, "fusion": fusion, "segment_ids": segment_ids, "scale": scale, "impl": impl}
        options |= {"sink_logit": sink_logit, "softcap": softcap, "return_aux": return_aux}
        return _as_autocast_would(query, key, value, pattern, options)
    check_arguments(query, key, value, pattern, gate, fusion, segment_ids)
    if not torch.compiler.is_compiling():
        refuse_context_parallel()
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}.")
    scale = query.shape[-1] ** -0.5 if scale is None else check_scale(scale)
    softcap = check_softcap(softcap)
    if sink_logit is not None:
        check_sink_logit(sink_logit, query)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    fusion = "mass" if gate is None else fusion

    plain = sink_logit is None and softcap is None and scale > 0  # what scaled_dot_product_attention computes
    if impl == "auto" and plain and not return_aux and not transforming() and _is_dense(query, key, pattern, starts):
        return beside_gate(dense_attention(query, key, value, pattern, starts, scale), gate)
    attend = _implementation(impl, query)
    of_scores: Any = {"scale": scale, "sink_logit": sink_logit, "softcap": softcap}
    out, lse_local, lse_skip = attend(query, key, value, pattern, gate=gate, fusion=fusion, starts=starts, **of_scores)
    if not return_aux:
        return out
    return out, PiAux(lse_local, lse_skip, gate_values(lse_local, lse_skip, gate, fusion))


def _is_dense(query: Tensor, key: Tensor, pattern: PiPattern, starts: Tensor | None) -> bool:
    """Whether PyTorch's kernels serve the call best: everything is seen, and they need no mask or ours cannot serve."""
    if not covers_everything(pattern, key.shape[2]):
        return False
    return not needs_mask(query, key, pattern, starts) or why_not_auto(query) is not None


def _under_autocast(query: Any) -> bool:
    """Whether autocast is on, and the query of a dtype that it casts (as of `scaled_dot_product_attention`)."""
    kind = query.device.type if isinstance(query, Tensor) else "meta"  # which autocast does not know
    return kind != "meta" and torch.is_autocast_enabled(kind) and query.dtype in CASTS


def _as_autocast_would(query: Tensor, key: Tensor, value: Tensor, pattern: PiPattern, options: dict[str, Any]) -> Any:
    attend: Any = pi_attention  # no overload takes a return_aux that is not known
    cast = as_autocast(query, key, value)
    with torch.autocast(query.device.type, enabled=False):
        return attend(*cast, pattern, **options)


def as_autocast(*tensors: Tensor) -> list[Tensor]:
    """Tensors in the dtype to which autocast, where it is on, casts query, key and value of `pi_attention`."""
    return [_as_autocast(x, tensors[0]) for x in tensors] if _under_autocast(tensors[0]) else list(tensors)


def _as_autocast(x: Any, like: Tensor) -> Any:
    return x.to(torch.get_autocast_dtype(like.device.type)) if isinstance(x, Tensor) and x.dtype in CASTS else x


def _implementation(impl: Impl, query: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The function that serves a call; "auto" logs why it is not the fused one."""
    if impl == "reference":
        from pi_attention.ops.reference import reference_attention

        return reference_attention
    if impl == "blocked":
        return blocked_attention
    reason = why_not_triton(query) if impl == "triton" else why_not_auto(query)
    if reason is None:
        return fused_attention if impl == "triton" or torch.compiler.is_compiling() else _fused_or_blocked
    if impl == "triton":
        raise NotImplementedError(f'impl="triton" cannot serve this call: {reason}. Use impl="auto" or "blocked".')
    if not torch.compiler.is_compiling():
        log.debug("blocked instead of triton: %s", reason)
    return blocked_attention


def _fused_or_blocked(query: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels, or plain PyTorch where they do not compile: that is warned of once, and not tried again."""
    try:
        return fused_attention(query, *others, **options, replaceable=True)
    except Exception as error:
        if not note_failure(query, error):
            raise
    return blocked_attention(query, *others, **options)
