"""What a pattern costs: visible pairs, FLOPs, cache. Exact counts, standard library only."""

from __future__ import annotations

from pi_attention.pattern import Band, PiPattern


def _pairs_of_lags(lags: range, length: int) -> int:
    return sum(length - abs(lag) for lag in lags)


def visible_pairs(pattern: PiPattern, length: int, *, head: int = 0) -> tuple[int, int]:
    """Query–key pairs that one head computes over a sequence of `length` tokens: local and skip."""

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
        skip -= sum(min(pattern.sinks, length - lag) for lag in skip_lags)
    return local, skip


def attention_flops(pattern: PiPattern, length: int, *, heads: int, head_dim: int) -> int:
    """Floating-point operations of one layer's forward pass over the visible pairs: 4 · D a pair (QKᵀ and PV)."""
    pairs = sum(sum(visible_pairs(pattern, length, head=h % len(pattern.periods))) for h in range(heads))
    return 4 * head_dim * pairs


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
