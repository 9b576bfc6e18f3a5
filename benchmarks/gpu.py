"""The fused kernels on a GPU against dense attention and FlexAttention: checked first, then timed.

    python -m benchmarks.gpu --patterns 4 --dims 128 64 --dense --peers --variants    # writes results/gpu-<device>.json

The floor of a row is the larger of two times: the fewest bytes moved at the measured copy bandwidth, and the products
of the visible pairs at the measured matrix rate.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from triton.testing import do_bench, do_bench_cudagraph

from benchmarks.peers import Attend, cudnn, fa4, fla, flex, sdpa
from benchmarks.timing import machine, write
from pi_attention import PiPattern, pi_attention
from pi_attention.accounting import attention_bytes, attention_flops, roofline_seconds

HEADS = 16
PATTERNS = [PiPattern(256, 256, 16), PiPattern(256, 256, 1), PiPattern(1024, 1024, 32), PiPattern(64, 64, 8)]
MAIN = PATTERNS[0]
SHORT = 8192
"""Up to here the host matters, and rows are measured in a CUDA graph, too."""
WAIT = 4_000_000
"""Cycles of the device, some 2 ms, in which the host launches a call."""


def median(run: Callable[[], Any]) -> float:
    """Microseconds."""
    return 1e3 * float(do_bench(run, warmup=25, rep=100, return_mode="median"))


def replayed(run: Callable[[], Any]) -> float:
    """Microseconds in a replayed CUDA graph: without the host's part, as torch.compile(mode="reduce-overhead") runs."""
    with torch.cuda.stream(torch.cuda.Stream()):
        return 1e3 * float(do_bench_cudagraph(run, rep=20, return_mode="median"))


def of_device(run: Callable[[], Any], calls: int = 15) -> float:
    """Microseconds of the kernels alone, for calls too large for a graph: they wait until the host has launched all."""
    for _ in range(3):
        run()
    times: list[float] = []
    wait = WAIT
    while len(times) < calls:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(wait)
        begun.record()
        run()
        ended.record()
        if begun.query():  # the kernels began before the host was done
            wait *= 2
            continue
        torch.cuda.synchronize()
        times.append(1e3 * begun.elapsed_time(ended))
    return statistics.median(times)


def ceilings() -> tuple[float, float]:
    """Measured bytes per second of a copy and operations per second of a bf16 matrix product."""
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / (1e-6 * median(lambda: target.copy_(source)))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / (1e-6 * median(lambda: a @ b))
    return bandwidth, rate


def problem(length: int, dim: int, groups: int = HEADS) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    shapes = [(1, HEADS, length, dim), (1, groups, length, dim), (1, groups, length, dim), (1, HEADS, length)]
    inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    return inputs, torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)


def check(name: str, got: Tensor, want: Tensor) -> None:
    error = float((got.float() - want.float()).norm() / want.float().norm())
    if not error < 1e-2:
        raise SystemExit(f"{name} is wrong: relative error {error:.2e}")


def time_both(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> dict[str, float]:
    wanted = [x for x in inputs if x.requires_grad]

    def step() -> None:
        torch.autograd.grad(attend(*inputs), wanted, grad, allow_unused=True)

    short = inputs[0].shape[2] <= SHORT
    timed = median if short else of_device
    with torch.no_grad():
        forward = timed(lambda: attend(*inputs))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    result = {"forward us": forward, "forward+backward us": timed(step), "peak MiB": peak / 2**20}
    if short:
        with torch.no_grad():
            result["forward in graph us"] = replayed(lambda: attend(*inputs))
        result["forward+backward in graph us"] = replayed(step)
    else:
        result["forward+backward from Python us"] = median(step)
    return result


def floors(
    pattern: PiPattern, length: int, dim: int, limits: tuple[float, float], groups: int = HEADS, documents: int = 1
) -> dict[str, float]:
    bandwidth, rate = limits
    rates = {"flops_per_second": rate, "bytes_per_second": bandwidth}
    moved = attention_bytes(length, heads=HEADS, kv_heads=groups, head_dim=dim)
    flops = attention_flops(pattern, length // documents, heads=HEADS, head_dim=dim) * documents
    return {
        "floor forward us": 1e6 * roofline_seconds(flops, moved["forward"], **rates),
        "floor forward+backward us": 1e6 * roofline_seconds(3.5 * flops, sum(moved.values()), **rates),
    }


def finished(result: dict[str, Any]) -> dict[str, Any]:
    """The row with its ratios to the floors, printed."""
    for kind in ("forward", "forward+backward"):
        result[f"{kind} over floor"] = result["pi"][f"{kind} us"] / result[f"floor {kind} us"]
    print(result, flush=True)
    return result


def ours(pattern: PiPattern) -> Callable[..., Tensor]:
    return lambda q, k, v, a: pi_attention(q, k, v, pattern, gate=a, impl="triton")


def row(pattern: PiPattern, length: int, dim: int, limits: tuple[float, float], beside_dense: bool) -> dict[str, Any]:
    inputs, grad = problem(length, dim)
    result: dict[str, Any] = {"S": length, "D": dim, "pattern": f"{pattern.window},{pattern.period},{pattern.skips}"}
    result |= floors(pattern, length, dim, limits)
    if length <= 32768:
        check("pi", ours(pattern)(*inputs), pi_attention(*inputs[:3], pattern, gate=inputs[3], impl="blocked"))
    result["pi"] = time_both(ours(pattern), inputs, grad)
    if beside_dense:
        result["sdpa causal"] = time_both(sdpa(), inputs, grad)
    return finished(result)


def with_peers(length: int, dim: int, limits: tuple[float, float]) -> dict[str, Any]:
    """The main pattern's row with every peer that this machine has, or what it said instead."""
    torch._dynamo.reset()  # its limit of recompilations is that of a whole process
    result = row(MAIN, length, dim, limits, beside_dense=True)
    inputs, grad = problem(length, dim)
    local = PiPattern(MAIN.window, 1, 0)
    union = PiPattern(MAIN.window, MAIN.period, MAIN.skips)
    wanted = {
        "flex local": ours(local),
        "cudnn local": ours(local),
        "fla window": ours(local),
        "fa4 local": ours(local),
        "fa4 local, repeatable": ours(local),
        "flex pair": ours(MAIN),
        "cudnn pair": ours(MAIN),
        "flex union": lambda q, k, v, a: pi_attention(q, k, v, union, fusion="mass", impl="triton"),
    }
    families: list[Callable[[], dict[str, Attend]]] = [
        lambda: {"sdpa causal, flash": sdpa(SDPBackend.FLASH_ATTENTION)},
        lambda: flex(MAIN, length),
        lambda: cudnn(MAIN, length),
        lambda: fa4(MAIN),
        lambda: fla(MAIN),
    ]
    for family in families:
        try:
            attends = family()
        except ImportError as error:
            print("left out:", error, flush=True)
            continue
        for name, attend in attends.items():
            try:
                if name in wanted:
                    check(name, attend(*inputs), wanted[name](*inputs))
                result[name] = time_both(attend, inputs, grad)
            except Exception as error:
                result[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            print(name, result[name], flush=True)
    return result


def variants(length: int, limits: tuple[float, float]) -> list[dict[str, Any]]:
    """The main row again: bidirectional, grouped queries, packed, sinks, a period a head; each with its own floor."""
    w, period, m = MAIN.window, MAIN.period_of(0), MAIN.skips
    near = tuple(period - 8 + head for head in range(HEADS))
    found = []
    for name, pattern, groups, documents in (
        ("causal", MAIN, HEADS, 1),
        ("bidirectional", PiPattern(w, period, m, causal=False), HEADS, 1),
        ("GQA 4:1", MAIN, HEADS // 4, 1),
        ("packed, 8 documents", MAIN, HEADS, 8),
        ("4 sinks", PiPattern(w, period, m, sinks=4), HEADS, 1),
        ("64 sinks", PiPattern(w, period, m, sinks=64), HEADS, 1),
        ("4 sinks, packed, 8 documents", PiPattern(w, period, m, sinks=4), HEADS, 8),
        ("a period a head", PiPattern(w, near, m), HEADS, 1),
    ):
        inputs, grad = problem(length, 128, groups)
        segments = (torch.arange(length, device="cuda") // (length // documents)).int()[None]
        ids = segments if documents > 1 else None

        def attend(*x: Tensor, pattern: PiPattern = pattern, ids: Tensor | None = ids, impl: Any = "triton") -> Tensor:
            return pi_attention(*x[:3], pattern, gate=x[3], segment_ids=ids, impl=impl)

        check(name, attend(*inputs), attend(*inputs, impl="blocked"))
        result: dict[str, Any] = {"name": name, "S": length, "pi": time_both(attend, inputs, grad)}
        found.append(finished(result | floors(pattern, length, 128, limits, groups, documents)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 32768, 131072])
    parser.add_argument("--dims", type=int, nargs="+", default=[128])
    parser.add_argument("--patterns", type=int, default=1, help="how many of the patterns")
    parser.add_argument("--dense", action="store_true", help="dense attention beside the main pattern at every length")
    parser.add_argument("--peers", action="store_true", help="every peer beside the main pattern at 32768")
    parser.add_argument("--variants", action="store_true", help="bidirectional, GQA, packed, sinks, per-head rows")
    parser.add_argument("--longest", type=int, nargs="*", default=[], help="lengths for the main pattern alone")
    options = parser.parse_args()
    device = torch.cuda.get_device_name()
    limits = ceilings()
    print(device, f"{limits[0] / 1e12:.2f} TB/s, {limits[1] / 1e12:.0f} TFLOP/s", machine(), flush=True)
    head = {"gpu": device, "copy bytes/s": limits[0], "matrix flop/s": limits[1], "H": HEADS, "dtype": "bfloat16"}
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "variants": []}

    def keep(kind: str, rows: list[dict[str, Any]]) -> None:
        found[kind] += rows
        write(f"gpu-{device.replace(' ', '-').lower()}", head | found)  # each row at once: a long run may be cut off

    if options.peers:
        for dim in options.dims:
            keep("rows", [with_peers(32768, dim, limits)])
    if options.variants:
        keep("variants", variants(32768, limits))
    for pattern, dim, length in itertools.product(PATTERNS[: options.patterns], options.dims, options.lengths):
        if not (options.peers and pattern == MAIN and length == 32768):
            keep("rows", [row(pattern, length, dim, limits, beside_dense=options.dense and pattern == MAIN)])
    for length in options.longest:
        keep("rows", [row(MAIN, length, 128, limits, False)])


if __name__ == "__main__":
    main()
