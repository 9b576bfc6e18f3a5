"""The GPU bill of one long sequence: memory a rank, bytes between ranks, and how many GPUs it takes at least.

A sequence is sharded over all ranks, parameters, gradients and AdamW's state too (ZeRO-3, fp32 with bf16 copies for the
products), and activations are recomputed layer by layer. Three ways to give a shard the keys that it needs are
compared: our halo, an all-gather, and dense Ring Attention (arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pi_attention.accounting import Sizes, model_flops
from pi_attention.bill.rank import WAYS, Rank, Way, keys_of_others, layer_parameters
from pi_attention.pattern import PiPattern, need_int, need_pattern

__all__ = ["MODELS", "WAYS", "Bill", "Way", "bill", "fewest_ranks", "layer_parameters", "parameters"]

MODELS = {
    "1b": Sizes(2048, 5632, 20, 16, 16, 128, 32000, 2048, 32),
    "8b": Sizes(4096, 14336, 32, 32, 8, 128, 128256, 4096, 32),
    "70b": Sizes(8192, 28672, 80, 64, 8, 128, 128256, 8192, 32),
}
"""Shapes of that many parameters, those of Llama 3 for 8b and 70b (arXiv 2407.21783), by the name that the command
line takes."""


def parameters(sizes: Sizes) -> int:
    """Weights of the model, with an embedding for the input and one for the output."""
    return sizes.num_hidden_layers * layer_parameters(sizes) + 2 * sizes.vocab_size * sizes.hidden_size


@dataclass(frozen=True)
class Bill:
    """What one rank holds and sends for a training step.

    Args:
        state: bytes of parameters and optimizer.
        gradients: bytes of the fp32 gradients when all exist, at the end of the backward pass.
        gathered: bytes of whole bf16 weights: the embeddings, a layer in use and one on its way.
        activations: bytes of the hidden states kept between layers, and of the rotary angles.
        layer: bytes of one layer's activations while its feed-forward network is differentiated.
        logits: bytes.
        keys: bytes of keys and values of other ranks in one layer, and of the gradients that go back to them, while
            its attention is differentiated; of the layer that needs most.
        peaks: bytes at the peak of each part of the step, see `rank.Rank.peaks`.
        received: bytes that a rank receives for one layer, forward and backward; for the one that needs most.
        flops: operations of a step, the recomputation of the layers included.
    """

    state: int
    gradients: int
    gathered: int
    activations: int
    layer: int
    logits: int
    keys: int
    peaks: dict[str, int]
    received: int
    flops: int

    @property
    def bytes(self) -> int:
        """At the peak of the step."""
        return max(self.peaks.values())


def bill(
    sizes: Sizes,
    pattern: PiPattern | Sequence[PiPattern],
    context: int,
    ranks: int,
    way: Way = "halo",
    loss_slice: int | None = None,
    *,
    dp: int = 1,
    tp: int = 1,
    zero: int = 3,
) -> Bill:
    """The bill of the rank that needs most.

    Args:
        sizes: of the model.
        pattern: of every layer, or a list with one for each; "dense ring" attends to everything instead.
        context: tokens of the sequence.
        ranks: that share it.
        way: how keys reach the ranks.
        loss_slice: tokens whose logits exist together; all of a rank's when None.
        dp: groups of ranks with a sequence each, over which parameters, gradients and optimizer are sharded, too.
        tp: ranks that share the heads and features of each layer; embeddings and hidden states are whole on each.
        zero: 3; or 2, where the bf16 weights stay whole; or 1, where the sums of the gradients do, too, in fp32.

    Raises:
        TypeError, ValueError: context, ranks, way, loss_slice, dp, tp or zero are wrong, a pattern is none or of other
            heads, or the model has another number of layers.
    """
    _check(sizes, context, ranks, way, loss_slice, dp, tp, zero)
    patterns = _of_layers(pattern, sizes)
    if way == "dense ring":
        patterns = [PiPattern(context, 1, 0, causal=each.causal) for each in patterns]
    row = 2 * sizes.num_key_value_heads * sizes.head_dim * 2 // tp  # key and value in bf16
    keys = {each: keys_of_others(way, each, context, ranks, row) for each in set(patterns)}
    of_layers, tokens = tuple(keys[each] for each in patterns), -(-context // ranks)
    rank = Rank(sizes, tokens, dp * ranks, tp, zero, loss_slice, way == "dense ring", of_layers)
    flops = sum(model_flops(patterns, context, sizes, backward=True).values())
    flops += sum(flops for part, flops in model_flops(patterns, context, sizes).items() if part != "head")
    return Bill(
        state=rank.state,
        gradients=rank.gradients,
        gathered=2 * (2 * rank.in_layer + rank.in_ends if zero == 3 else rank.weights),
        activations=sizes.num_hidden_layers * rank.hidden + rank.angles,
        layer=rank.feed_forward,
        logits=rank.logits,
        keys=max(layer.held for layer in of_layers),
        peaks=rank.peaks(),
        received=max(layer.received for layer in of_layers),
        flops=flops // (ranks * tp),
    )


def _of_layers(pattern: PiPattern | Sequence[PiPattern], sizes: Sizes) -> list[PiPattern]:
    """The pattern of every layer.

    Raises:
        TypeError, ValueError: one is no pattern or of other heads, or the model has another number of layers.
    """
    if not isinstance(pattern, Sequence):
        need_pattern(pattern)
    patterns = [pattern] * sizes.num_hidden_layers if isinstance(pattern, PiPattern) else list(pattern)
    if len(patterns) != sizes.num_hidden_layers:
        raise ValueError(f"pattern has {len(patterns)} entries: give one for each of {sizes.num_hidden_layers} layers.")
    for each in patterns:
        need_pattern(each)
        each.check_heads(sizes.num_attention_heads)
    return patterns


def _check(
    sizes: Sizes, context: int, ranks: int, way: Way, loss_slice: int | None, dp: int, tp: int, zero: int
) -> None:
    for name, size, least in (("context", context, 1), ("ranks", ranks, 0), ("dp", dp, 1), ("tp", tp, 1)):
        need_int(name, size, least, "a number of tokens or of ranks")
    heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
    if heads % tp or groups % tp or sizes.intermediate_size % tp:
        inner = sizes.intermediate_size
        raise ValueError(f"tp={tp} must divide the {heads} heads, {groups} key heads and {inner} features of a layer.")
    if zero not in (1, 2, 3) or isinstance(zero, bool):
        raise ValueError(f"zero={zero} must be 3, 2 or 1.")
    if loss_slice is not None:
        need_int("loss_slice", loss_slice, 1, "tokens, or None")
    if not 1 <= ranks <= context:
        raise ValueError(f"ranks={ranks} must be from 1 to context={context}.")
    if way not in WAYS:
        raise ValueError(f"way={way!r} is unknown: use one of {list(WAYS)}.")


def fewest_ranks(
    sizes: Sizes,
    pattern: PiPattern | Sequence[PiPattern],
    context: int,
    memory: int,
    way: Way,
    loss_slice: int | None = None,
    **layout: int,
) -> int | None:
    """The fewest ranks that share a sequence, a power of two up to 4,096, on which the step fits.

    Args:
        memory: bytes of a GPU.
        layout: dp, tp and zero of `bill`, whose other arguments are these.

    Raises:
        TypeError, ValueError: as `bill` does.
    """
    bill(sizes, pattern, context, 1, way, loss_slice, **layout)
    counts = (1 << power for power in range(13) if 1 << power <= context)
    bills = ((n, bill(sizes, pattern, context, n, way, loss_slice, **layout)) for n in counts)
    return next((n for n, made in bills if made.bytes <= memory), None)
