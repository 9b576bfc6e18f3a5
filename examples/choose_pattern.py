"""Compare patterns for a context before any training: keys, lags seen by one layer, layers to see everything, FLOPs.

python examples/choose_pattern.py --context 8192 --heads 8 --budget 128
"""

import argparse
from pathlib import Path

from pi_attention import PiPattern, coordinated_heads
from pi_attention.accounting import attention_flops, dense_flops
from pi_attention.planner import fewest_keys, longest_stretch
from pi_attention.plots import pattern_picture, save, telling_length
from pi_attention.receptive_field import joint_coverage, receptive_field


def candidates(context: int, heads: int, budget: int) -> dict[str, PiPattern]:
    """Patterns of `budget` keys a query; the planned one may need fewer."""
    half = budget // 2
    return {
        "window alone": PiPattern(budget, budget, 0),
        "one period": PiPattern(half, half, half),
        "heads that share the distance": coordinated_heads(window=half, skips=half, heads=heads),
        "longest stretch of lags": longest_stretch(budget, heads, least_window=budget // 4, context=context).pattern,
        "fewest keys in 3 layers": fewest_keys(context, 3, heads=heads).pattern,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--budget", type=int, default=128, help="keys a query")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--out", type=Path, help="file of a picture of the heads that share the distance")
    options = parser.parse_args()
    dense = dense_flops(options.context, heads=options.heads, head_dim=64)
    print(f"{'pattern':<30} {'keys':>5} {'every lag below':>16} {'layers to see all':>18} {'FLOPs of dense':>15}")
    found = candidates(options.context, options.heads, options.budget)
    for name, pattern in found.items():
        together = joint_coverage(pattern, options.context)
        hops = receptive_field([pattern] * options.layers, options.context).layers_to_cover()
        flops = attention_flops(pattern, options.context, heads=options.heads, head_dim=64) / dense
        keys, layers = pattern.window + (pattern.skips or 0), "more than these" if hops is None else f"{hops}"
        print(f"{name:<30} {keys:>5} {together.stretch:>16,} {layers:>18} {flops:>15.1%}")
    if options.out is not None:
        shown = found["heads that share the distance"]
        save(pattern_picture(shown, telling_length(shown, options.context)), options.out)
        print(f"written: {options.out}")


if __name__ == "__main__":
    main()
