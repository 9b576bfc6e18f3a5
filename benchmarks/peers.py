"""What users would otherwise take, each as `attend(query, key, value, gate)` on `[B, H, S, D]` tensors.

Those that compute what one of our patterns computes are checked against it before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pi_attention import PiPattern

Attend = Callable[..., Tensor]


def sdpa(backend: SDPBackend | None = None) -> Attend:
    """Dense causal attention of PyTorch, by the kernel that it chooses (cuDNN's on Hopper) or by the one named."""

    def attend(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def gated(pattern: PiPattern, length: int, near: Attend, far: Attend) -> Attend:
    """Both bands by two kernels, fused by a compiled torch gate; where no skip is in sight, `far` may hold anything."""
    start = pattern.skip_band().first * pattern.period_of(0)

    @torch.compile
    def mix(local: Tensor, skip: Tensor, a: Tensor) -> Tensor:
        some = torch.arange(length, device=a.device) >= start
        g = torch.where(some, torch.sigmoid(a.float()), 1.0)[..., None]
        return (g * local + (1 - g) * torch.where(some[:, None], skip, 0.0)).to(local.dtype)

    return lambda q, k, v, a: mix(near(q, k, v, a), far(q, k, v, a), a)


def flex(pattern: PiPattern, length: int) -> dict[str, Attend]:
    """FlexAttention: the local band, both bands (the skip band in residue order), and one softmax over their union."""
    compiled = torch.compile(flex_attention, dynamic=False)
    window, period, skip = pattern.window, pattern.period_of(0), pattern.skip_band()
    rows = length // period
    local = create_block_mask(lambda b, h, q, k: (q - k >= 0) & (q - k < window), None, None, length, length)
    far = create_block_mask(lambda b, h, q, k: (q - k >= skip.first) & (q - k < skip.last), None, None, rows, rows)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        lag = q - k
        at = (lag >= skip.first * period) & (lag < skip.last * period) & (lag % period == 0)
        return (lag >= 0) & ((lag < window) | at)

    union = create_block_mask(seen, None, None, length, length)

    def fold(x: Tensor) -> Tensor:
        b, h, _, d = x.shape
        return x.view(b, h, rows, period, d).permute(0, 3, 1, 2, 4).reshape(b * period, h, rows, d)

    def unfold(x: Tensor) -> Tensor:
        return x.view(1, period, *x.shape[1:]).permute(0, 2, 3, 1, 4).reshape(1, x.shape[1], length, -1)

    def near(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=local)

    def both(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        return unfold(compiled(fold(q), fold(k), fold(v), block_mask=far))

    def one(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=union)

    return {"flex local": near, "flex pair": gated(pattern, length, near, both), "flex union": one}


class CudnnBand(torch.autograd.Function):
    """cuDNN's sliding-window attention through nvidia-cudnn-frontend, on strided views, without copies."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        out = torch.empty_strided(q.shape, q.stride(), device=q.device, dtype=q.dtype)
        stats = torch.empty(*q.shape[:3], 1, device=q.device, dtype=torch.float32)
        run = cudnn_graph(False, window, *((tuple(x.shape), x.stride()) for x in (q, k, v)))
        run([q, k, v], [out, stats])
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, stats = ctx.saved_tensors
        grads = [torch.empty_strided(x.shape, x.stride(), device=x.device, dtype=x.dtype) for x in (q, k, v)]
        key = ((tuple(x.shape), x.stride()) for x in (q, k, v, out, grad))
        cudnn_graph(True, ctx.window, *key)([q, k, v, out, grad, stats], grads)
        return (*grads, None)


@cache
def cudnn_graph(backward: bool, window: int, *layouts: tuple[tuple[int, ...], tuple[int, ...]]) -> Callable[..., None]:
    import cudnn

    handle = cudnn.create_handle()
    half, full = cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=half, intermediate_data_type=full, compute_data_type=full, handle=handle)
    inputs = [graph.tensor(dim=list(s), stride=list(t), data_type=half) for s, t in layouts]
    shape, stride = layouts[0]
    rows = [*shape[:3], 1]
    row_stride = [shape[1] * shape[2], shape[2], 1, 1]
    options = {
        "attn_scale": shape[-1] ** -0.5,
        "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
        "diagonal_band_left_bound": window,
        "diagonal_band_right_bound": 0,
    }
    if backward:
        stats = graph.tensor(dim=rows, stride=row_stride, data_type=full)
        q, k, v, out, grad = inputs
        outputs = list(graph.sdpa_backward(q=q, k=k, v=v, o=out, dO=grad, stats=stats, **options))
        inputs.append(stats)
        for output, (s, t) in zip(outputs, layouts, strict=False):
            output.set_output(True).set_dim(list(s)).set_stride(list(t)).set_data_type(half)
    else:
        q, k, v = inputs
        out, stats = graph.sdpa(q=q, k=k, v=v, generate_stats=True, **options)
        out.set_output(True).set_dim(list(shape)).set_stride(list(stride)).set_data_type(half)
        stats.set_output(True).set_dim(rows).set_stride(row_stride).set_data_type(full)
        outputs = [out, stats]
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(graph.get_workspace_size(), device="cuda", dtype=torch.uint8)

    def run(given: list[Tensor], found: list[Tensor]) -> None:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        tensors = dict(zip([*inputs, *outputs], [*given, *found], strict=True))
        graph.execute(tensors, workspace, handle=handle)

    return run


def cudnn(pattern: PiPattern, length: int) -> dict[str, Attend]:
    """cuDNN's sliding window: the local band alone, and with it the skip band as a window over the residue view.

    In that view a batch entry holds every period-th position, so that the skip band is the causal window of `skips`
    keys of rows shifted by its first multiple: keys 0 … n - first - 1 for queries first … n - 1.
    """
    window, period, first = pattern.window, pattern.period_of(0), pattern.skip_band().first

    def residues(x: Tensor) -> Tensor:  # [1, H, S, D] -> [period, H, S / period, D], a view
        return x[0].unflatten(1, (-1, period)).permute(2, 0, 1, 3)

    def near(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        return CudnnBand.apply(q, k, v, window)  # type: ignore[no-any-return, no-untyped-call]

    def far(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        early = [residues(x)[:, :, : length // period - first] for x in (k, v)]
        late = residues(q)[:, :, first:]
        found = CudnnBand.apply(late, *early, pattern.skips)  # type: ignore[no-untyped-call]
        found = found.permute(1, 2, 0, 3).flatten(1, 2)[None]
        return F.pad(found, (0, 0, first * period, 0))

    return {"cudnn local": near, "cudnn pair": gated(pattern, length, near, far)}


def fla(pattern: PiPattern) -> dict[str, Attend]:
    """flash-linear-attention: a sliding window, and native sparse attention of about the same number of keys.

    The latter wants 16 query heads for a key head, and its window needs another package, so it selects blocks only:
    16 keys' worth of compression scores for each 64-key block, then as many 64-key blocks as the window holds.
    """
    from fla.ops.attn import parallel_attn
    from fla.ops.nsa import parallel_nsa

    def turned(run: Callable[..., Tensor]) -> Attend:
        return lambda q, k, v, a: run(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), a).transpose(1, 2)

    def window(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        return parallel_attn(q, k, v, window_size=pattern.window)  # type: ignore[no-any-return]

    def sparse(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        g = torch.sigmoid(a).transpose(1, 2).to(q.dtype).contiguous()
        blocks = max(1, (pattern.window + pattern.skips) // 64)
        return parallel_nsa(q, k[:, :, :1], v[:, :, :1], g, g, None, block_counts=blocks, block_size=64)  # type: ignore[no-any-return]

    return {"fla window": turned(window), "fla nsa": turned(sparse)}


def fa4(pattern: PiPattern) -> dict[str, Attend]:
    """FlashAttention-4 (flash-attn-4): dense causal attention, and the local band by its sliding window.

    The window's gradients are added in the order in which they come, or, as ours always are, in the same one every
    time.
    """
    from flash_attn.cute.interface import flash_attn_func

    def turned(**options: Any) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
            out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options)
            out = out[0] if isinstance(out, tuple) else out
            return out.transpose(1, 2)  # type: ignore[no-any-return]

        return attend

    window = (pattern.window - 1, 0)  # the keys before a query
    return {
        "fa4 causal": turned(causal=True),
        "fa4 local": turned(window_size=window),
        "fa4 local, repeatable": turned(window_size=window, deterministic=True),
    }
