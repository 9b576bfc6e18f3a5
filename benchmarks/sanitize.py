"""Every kernel once on small odd shapes, for a memory and race checker:

compute-sanitizer --tool memcheck python -m benchmarks.sanitize
compute-sanitizer --tool racecheck python -m benchmarks.sanitize
TRITON_INSTRUMENTATION_MODE=consan python -m benchmarks.sanitize --hopper

The last line is Triton's concurrency sanitizer: each copy, barrier and product of the Hopper kernels is followed while
they run, and a race ends the process. It compiles for minutes.
"""

import argparse

import torch
import triton

from pi_attention import PiPattern, pi_attention

CASES = [  # pattern, H, G, T, S, D
    (PiPattern(32, 32, 4, sinks=2), 4, 2, 161, 161, 40),
    (PiPattern(64, 64, 8), 2, 2, 300, 300, 64),
    (PiPattern(20, (7, 9), 3), 2, 1, 97, 97, 16),
    (PiPattern(20, 8, 3, phase=(0, 3, 5, 6)), 4, 1, 97, 97, 16),
    (PiPattern(16, 16, 4, causal=False), 2, 2, 130, 130, 32),
    (PiPattern(64, 64, 8, sinks=4), 2, 2, 4, 500, 64),
]
HOPPER_CASES = [
    (PiPattern(100, 64, 8), 2, 2, 1000, 1000, 128),
    (PiPattern(70, 4, 40, phase=(0, 1, 2, 3)), 4, 2, 1200, 1200, 128),
    (PiPattern(70, 4, 40, phase=(0, 1)), 2, 2, 1200, 1200, 64),
]


def serve_small_calls() -> None:
    """Let the Hopper kernels serve calls of any size, and give the sanitizer the memory that it asks for.

    Triton looks for the allocator in the thread that launches, so the backward pass may have none of its own.
    """
    from pi_attention.ops.fused.hopper import serves

    serves.LEAST, serves.LEAST_OF_SKIPS = 0, (1, 1)
    torch.autograd.set_multithreading_enabled(False)
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, device="cuda", dtype=torch.int8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hopper", action="store_true", help="the kernels for Hopper GPUs")
    parser.add_argument("--case", type=int, help="one of them alone")
    options = parser.parse_args()
    if options.hopper:
        serve_small_calls()
    cases = HOPPER_CASES if options.hopper else CASES
    torch.manual_seed(0)
    for pattern, heads, groups, queries, keys, dim in cases if options.case is None else [cases[options.case]]:
        training = queries == keys
        shapes = [(1, heads, queries, dim), (1, groups, keys, dim), (1, groups, keys, dim), (1, heads, queries)]
        q, k, v, a = (
            torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_(training and not pattern.sinks)
            for s in shapes
        )
        out = pi_attention(q, k, v, pattern, gate=a, impl="triton")
        if out.requires_grad:
            out.float().square().sum().backward()
        torch.cuda.synchronize()
        print("ran", pattern, flush=True)


if __name__ == "__main__":
    main()
