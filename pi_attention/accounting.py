"""What a pattern costs: visible pairs, FLOPs, bytes, cache; of the operator, a layer, a model. Exact, standard library.

A floating-point operation is one addition or multiplication in a matrix product; softmax, norms, rotary embedding and
activations are left out, as PyTorch's FlopCounterMode leaves them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pi_attention.pattern import Band, PiPattern


def _pairs_of_lags(lags: range, length: int) -> int:
    """The sum of length − |lag|, in closed form."""
    if not lags:
        return 0
    if lags[0] < 0 < lags[-1]:
        negative = -(lags[0] // lags.step)
        return _pairs_of_lags(lags[:negative], length) + _pairs_of_lags(lags[negative:], length)
    return len(lags) * length - abs(len(lags) * (lags[0] + lags[-1]) // 2)


def visible_pairs(pattern: PiPattern, length: int, *, head: int = 0) -> tuple[int, int]:
    """Query–key pairs that one head computes over a sequence of `length` tokens: local and skip.

    Raises:
        ValueError: the pattern has no such head, or is a ring whose period does not divide the length.
    """
    pattern.check_length(length)
    if pattern.per_head and not 0 <= head < len(pattern.periods):
        raise ValueError(f"head={head} is not one of the pattern's {len(pattern.periods)} heads, counted from 0.")

    def pairs(band: Band) -> int:
        signed = pattern.signed_bands(band, length)
        if pattern.ring:
            return length * sum(len(side) for side in signed)
        return sum(_pairs_of_lags(side.lags(), length) for side in signed)

    local, skip = pairs(pattern.local_band), pairs(pattern.skip_band(head))
    if pattern.sinks:
        sinks = range(min(pattern.sinks, length))
        local += sum(max(0, length - pattern.window - sink) for sink in sinks)
        skip_lags = pattern.skip_band(head).within(length).lags()
        far = len(range(skip_lags.start, max(skip_lags.start, length - pattern.sinks + 1), skip_lags.step))
        far = min(far, len(skip_lags))  # queries as many as sinks stand this far from them; beyond, fewer
        skip -= far * pattern.sinks + _pairs_of_lags(skip_lags[far:], length)
    return local, skip


def decoding_keys(pattern: PiPattern, length: int, *, head: int = 0) -> tuple[int, int]:
    """Keys that one head reads for a decoded token, the last of `length`: local (sinks counted) and skip.

    With `skips=None` a head of period p reads 1/p of the keys, those of its phase; `cache_tokens` is what is kept.
    """
    local = min(pattern.window, length)
    sinks = min(pattern.sinks, length - local)  # those that the window leaves out
    skip_lags = pattern.skip_band(head).within(length).lags()
    near = range(skip_lags.start, max(skip_lags.start, length - pattern.sinks), skip_lags.step)
    return local + sinks, min(len(near), len(skip_lags))


def attention_flops(pattern: PiPattern, length: int, *, heads: int, head_dim: int) -> int:
    """Floating-point operations of one layer's forward pass over the visible pairs: 4 · D a pair (QKᵀ and PV).

    Raises:
        ValueError: the pattern is for another number of heads, or is a ring whose period does not divide the length.
    """
    pattern.check_heads(heads)
    of_heads = [sum(visible_pairs(pattern, length, head=head)) for head in range(len(pattern.periods))]
    return 4 * head_dim * sum(of_heads[head % len(of_heads)] for head in range(heads))


def dense_flops(length: int, *, heads: int, head_dim: int, causal: bool = True) -> int:
    """The same for dense attention."""
    pairs = length * (length + 1) // 2 if causal else length * length
    return 4 * head_dim * heads * pairs


def cache_tokens(pattern: PiPattern, length: int) -> int:
    """Tokens that a decoding cache must keep after `length` tokens: the last `reach`, and the sinks before them."""
    if pattern.reach is None:
        return length
    kept = min(length, pattern.reach)
    return kept + min(pattern.sinks, length - kept)


def cache_bytes(pattern: PiPattern, length: int, *, kv_heads: int, head_dim: int, element_bytes: int = 2) -> int:
    """Bytes of one layer's keys and values for `cache_tokens`."""
    return 2 * cache_tokens(pattern, length) * kv_heads * head_dim * element_bytes


def stack_cost(
    patterns: Sequence[PiPattern], length: int, *, heads: int, kv_heads: int, head_dim: int, element_bytes: int = 2
) -> dict[str, int]:
    """Operations of the attention of all layers, and bytes of their caches, each beside dense attention in all layers.

    The operations are of one forward pass; the dense cache holds every token.
    """
    sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "element_bytes": element_bytes}
    layers, causal = len(patterns), patterns[0].causal
    return {
        "flops": sum(attention_flops(pattern, length, heads=heads, head_dim=head_dim) for pattern in patterns),
        "dense flops": layers * dense_flops(length, heads=heads, head_dim=head_dim, causal=causal),
        "cache bytes": sum(cache_bytes(pattern, length, **sizes) for pattern in patterns),
        "dense cache bytes": layers * 2 * length * kv_heads * head_dim * element_bytes,
    }


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder that its cost depends on (names as in `PiConfig`).

    Args:
        gate_width: hidden width of the fusion gate, with `gate_features` inputs; 0 for no gate.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    gate_features: int = 0
    gate_width: int = 0


def layer_flops(pattern: PiPattern, length: int, sizes: Sizes) -> dict[str, int]:
    """Operations of one layer's forward pass over `length` tokens: attention, gate, projections, feed-forward."""
    heads, dim = sizes.num_attention_heads, sizes.head_dim
    projected = (2 * heads + 2 * sizes.num_key_value_heads) * dim  # q, o, k, v
    gate = sizes.gate_features * sizes.gate_width + sizes.gate_width * heads if pattern.skips != 0 else 0
    return {
        "attention": attention_flops(pattern, length, heads=heads, head_dim=dim),
        "gate": 2 * length * gate,
        "projections": 2 * length * sizes.hidden_size * projected,
        "feed-forward": 6 * length * sizes.hidden_size * sizes.intermediate_size,
    }


def model_flops(patterns: Sequence[PiPattern], length: int, sizes: Sizes, *, backward: bool = False) -> dict[str, int]:
    """Operations of a model's forward pass over one sequence, by part; with `backward` those of a training step.

    The backward pass of a product is two products. That of attention is two and a half times its forward pass in the
    fused and blocked implementations, which compute the scores again (five products for two).
    """
    total = {"attention": 0, "gate": 0, "projections": 0, "feed-forward": 0}
    for pattern in patterns:
        for part, flops in layer_flops(pattern, length, sizes).items():
            total[part] += flops
    total["head"] = 2 * length * sizes.hidden_size * sizes.vocab_size
    if backward:
        total = {part: flops * 7 // 2 if part == "attention" else flops * 3 for part, flops in total.items()}
    return total


def attention_bytes(length: int, *, heads: int, kv_heads: int, head_dim: int, element_bytes: int = 2) -> dict[str, int]:
    """The fewest bytes that a layer's operator moves: q, k, v and out; backward those, dO, dq, dk and dv."""
    tensors = 2 * (heads + kv_heads) * length * head_dim * element_bytes
    return {"forward": tensors, "backward": 2 * tensors}


def roofline_seconds(flops: float, moved: float, *, flops_per_second: float, bytes_per_second: float) -> float:
    """The least time of a kernel: the larger of its arithmetic and its memory traffic."""
    return max(flops / flops_per_second, moved / bytes_per_second)


def saving_over_dense(pattern: PiPattern, length: int, sizes: Sizes) -> float:
    """Share of a dense model's forward operations that a model of this pattern in every layer saves, gate included."""
    layers = sizes.num_hidden_layers
    ours = sum(model_flops([pattern] * layers, length, sizes).values())
    everything = PiPattern(length, 1, 0, causal=pattern.causal)
    return 1 - ours / sum(model_flops([everything] * layers, length, sizes).values())
