"""Every kernel once on small odd shapes, for a memory and race checker:

compute-sanitizer --tool memcheck python -m benchmarks.sanitize
compute-sanitizer --tool racecheck python -m benchmarks.sanitize
"""

import torch

from pi_attention import PiPattern, pi_attention

CASES = [  # pattern, H, G, T, S, D
    (PiPattern(32, 32, 4, sinks=2), 4, 2, 161, 161, 40),
    (PiPattern(64, 64, 8), 2, 2, 300, 300, 64),
    (PiPattern(20, (7, 9), 3), 2, 1, 97, 97, 16),
    (PiPattern(20, 8, 3, phase=(0, 3, 5, 6)), 4, 1, 97, 97, 16),
    (PiPattern(16, 16, 4, causal=False), 2, 2, 130, 130, 32),
    (PiPattern(64, 64, 8, sinks=4), 2, 2, 4, 500, 64),
]


def main() -> None:
    torch.manual_seed(0)
    for pattern, heads, groups, queries, keys, dim in CASES:
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
