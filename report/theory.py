"""Tables of docs/theory.md: computed, but for the Jacobian, which was measured."""

from __future__ import annotations

from benchmarks.theory import PATTERNS, fields
from pi_attention.accounting import (
    Sizes,
    attention_flops,
    decoding_keys,
    dense_flops,
    saving_over_dense,
    visible_pairs,
)
from pi_attention.heads import coordinated_heads
from pi_attention.pattern import PiPattern
from report.markdown import read, table


def coverage() -> str:
    """Exact receptive fields of the examples."""
    rows = []
    for name, field in fields(32768).items():
        periods = _spelled(PATTERNS[name])
        cells = [f"{field.covered(n):,}; {field.reach(n):,}" for n in (1, 2, 4, 8)]
        hops = field.layers_to_cover()
        rows.append([name, periods, *cells, "more than 8" if hops is None else str(hops)])
    return table(["", "periods", "1 layer", "2", "4", "8 layers", "layers to see everything"], rows)


def _spelled(pattern: PiPattern) -> str:
    """The periods of a pattern, and its phases if there are any."""
    if not pattern.skips:
        return "–"
    periods = ", ".join(map(str, dict.fromkeys(pattern.periods)))
    return periods + (f"; phases {', '.join(map(str, pattern.phases))}" if any(pattern.phases) else "")


def one_layer() -> str:
    """What the heads see together in one layer, how many keys a lag has, and what layers cover."""
    result = read("one_layer")
    context, edges = result["context"], result["edges"]
    rows = []
    for row in result["rows"]:
        hops = row["layers to see everything"]
        cells = [f"{row[kind]:,}" for kind in ("stretch", "holes", "reach")]
        cells += [f"{share:.3f}" if share else "0" for share in row["density"]]
        cells.append(f"more than {result['layers at most']}" if hops is None else str(hops))
        rows.append([row["name"], _spelled(PiPattern.from_dict(row["pattern"])), *cells])
    ranges = [f"{first:,} to {end - 1:,}" for first, end in zip(edges, [*edges[1:], context], strict=True)]
    head = ["", "periods", "stretch", "holes", "reach", *(f"keys at {lags}" for lags in ranges)]
    return table([*head, f"layers to see {context:,}"], rows)


def all_skips() -> str:
    """A layer of coordinated heads with all skips beside a dense one."""
    rows = []
    for period in (4, 8):
        pattern = coordinated_heads(16, None, period, period)
        for length in (2048, 32768, 1 << 20):
            share = attention_flops(pattern, length, heads=period, head_dim=64)
            share /= dense_flops(length, heads=period, head_dim=64)
            read = sum(decoding_keys(pattern, length))
            pairs = sum(visible_pairs(pattern, length))
            rows.append([str(period), f"{length:,}", f"{pairs:,}", f"{share:.2%}", f"{read:,}", f"{read / length:.2%}"])
    head = ["period", "context", "pairs of head 0", "products, of dense", "keys a decoded token reads", "of the cache"]
    return table(head, rows)


def influence() -> str:
    """The Jacobian of the last position by the layers that an input needs."""
    result = read("influence")
    networks = result["networks"]
    norms = [[row["median norm"] for row in network["by layers needed"]] for network in networks]
    rows = [
        [str(row["layers"]), f"{row['positions']:,}", *(f"{found[i]:.2g}" for found in norms)]
        for i, row in enumerate(networks[0]["by layers needed"])
    ]
    wrong = ", ".join(f"{network['weights']}: {network['contradictions']}" for network in networks)
    head = ["layers needed", "positions", *(f"median norm, {network['weights']} weights" for network in networks)]
    described = f"{result['pattern']}, {result['tokens']:,} tokens; positions that contradict the prediction: {wrong}."
    return described + "\n\n" + table(head, rows)


def saving() -> str:
    """Share of the forward operations of a dense model that π-attention saves."""
    lengths = [1024, 2048, 4096, 8192, 16384, 32768, 131072]
    rows = []
    for name, hidden, layers, heads in (
        ("124 M", 768, 12, 12),
        ("1.3 B", 2048, 24, 16),
        ("7 B", 4096, 32, 32),
        ("70 B", 8192, 80, 64),
    ):
        inner = -(-8 * hidden // 3 // 32) * 32
        sizes = Sizes(hidden, inner, layers, heads, heads, hidden // heads, 50257, gate_features=hidden, gate_width=32)
        savings = [saving_over_dense(PiPattern(256, 256, 16), length, sizes) for length in lengths]
        rows.append([f"{name} ({layers} layers of {hidden})", *(f"{saving:.1%}" for saving in savings)])
    return table(["", *(f"S = {length:,}" for length in lengths)], rows)
