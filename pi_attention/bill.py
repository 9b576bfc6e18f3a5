"""The GPU bill of one long sequence: memory a rank, bytes between ranks, and how many GPUs it takes at least.

A sequence is sharded over all ranks, parameters, gradients and AdamW's state too (ZeRO-3, fp32 with bf16 copies for the
products), and activations are recomputed layer by layer. Three ways to give a shard the keys that it needs are
compared: our halo, an all-gather, and dense Ring Attention (arXiv 2310.01889).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pi_attention.accounting import Sizes, model_flops
from pi_attention.distributed.plan import halo_plan
from pi_attention.pattern import PiPattern

Way = Literal["halo", "all-gather", "dense ring"]
WAYS: tuple[Way, ...] = ("halo", "all-gather", "dense ring")

STATE_BYTES = 12
"""Of a parameter: fp32 weight and two fp32 moments. Gradients come into being layer by layer, see `_peaks`."""
LOGIT_BYTES = 12
"""Of a logit, where the loss is differentiated: in fp32 the log-softmax, its gradient and that of the logits.

The bf16 logits and their fp32 copy are freed by then, and the bf16 gradient is made after the log-softmax is freed."""

MODELS = {
    "1b": Sizes(2048, 5632, 20, 16, 16, 128, 32000, 2048, 32),
    "8b": Sizes(4096, 14336, 32, 32, 8, 128, 128256, 4096, 32),
    "70b": Sizes(8192, 28672, 80, 64, 8, 128, 128256, 8192, 32),
}
"""Shapes of that many parameters, those of Llama 3 for 8b and 70b (arXiv 2407.21783), by the name that the command
line takes."""


def layer_parameters(sizes: Sizes) -> int:
    """Weights of one layer's products."""
    attention = (2 * sizes.num_attention_heads + 2 * sizes.num_key_value_heads) * sizes.head_dim
    gate = (sizes.gate_features + sizes.num_attention_heads) * sizes.gate_width
    return sizes.hidden_size * (attention + 3 * sizes.intermediate_size) + gate


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
            its attention is differentiated.
        peaks: bytes at the peak of each part of the step, see `_peaks`.
        received: bytes that a rank receives for one layer, forward and backward.
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


@dataclass(frozen=True)
class _Held:
    """Of a rank: numbers of weights, and bytes of activations."""

    layers: int
    in_layer: int
    in_ends: int
    shards: int
    zero: int
    hidden: int
    angles: int
    feed_forward: int
    attention: int
    logits: int
    slices: int

    @property
    def weights(self) -> int:
        """Those that FSDP shards."""
        return self.layers * self.in_layer + self.in_ends


def _peaks(held: _Held) -> dict[str, int]:
    """Bytes at the peaks of a step, all in the backward pass: of the loss, a layer's halves, and sums over ranks.

    From the last layer to the first, hidden states are freed and gradients come into being. Both are linear in the
    layers, so the peak is at the last one, at the one before, where the last one's sums are on their way, or at the
    first.
    """
    whole = 2 * held.weights if held.zero < 3 else 0  # bf16, between forward and backward too
    stays = STATE_BYTES * held.weights // held.shards + held.angles + whole
    stays += 4 * held.weights if held.zero == 1 else 0  # sums of the batches before
    ends, next_layer = (0, 0) if whole else (2 * held.in_ends, 2 * held.in_layer)
    head = held.in_ends  # bf16 gradient of the output's embedding, half of the ends; summed with the input's at last
    summed = (2 + 4) * held.in_layer  # a layer's bf16 gradients and their fp32 copy, which ranks sum
    loss = stays + (held.layers + 2) * held.hidden + held.logits  # two: before and after the last norm
    if held.slices:  # then the head is called within the model, whose ends FSDP keeps gathered
        loss += ends + (head if held.slices > 1 else 0)
    feed_forward, attention, sums = 0, 0, 0
    for left in {held.layers, max(1, held.layers - 1), 1}:
        done = held.layers - left
        base = stays + ends + head + left * held.hidden + 4 * done * held.in_layer // held.shards
        on_their_way = 4 * held.in_layer if done else 0
        in_layer = base + 2 * next_layer + on_their_way  # its own weights and the next one's
        feed_forward = max(feed_forward, in_layer + held.feed_forward)
        attention = max(attention, in_layer + held.attention)
        sums = max(sums, base + 2 * next_layer + summed)  # the next one's weights, and the buffer that brought them
    of_ends = stays + 4 * held.weights // held.shards + (2 + 4) * held.in_ends
    return {
        "the loss": loss,
        "a layer's feed-forward": feed_forward,
        "a layer's attention": attention,
        "a layer's sums": sums,
        "the embeddings' sums": of_ends,
    }


def bill(
    sizes: Sizes,
    pattern: PiPattern,
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
        pattern: of every layer; "dense ring" attends to everything instead.
        context: tokens of the sequence.
        ranks: that share it.
        way: how keys reach the ranks.
        loss_slice: tokens whose logits exist together; all of a rank's when None.
        dp: groups of ranks with a sequence each, over which parameters, gradients and optimizer are sharded, too.
        tp: ranks that share the heads and features of each layer; embeddings and hidden states are whole on each.
        zero: 3; or 2, where the bf16 weights stay whole; or 1, where the sums of the gradients do, too, in fp32.

    Raises:
        ValueError: ranks, way, loss_slice, dp, tp or zero are wrong.
    """
    for name, size in (("dp", dp), ("tp", tp)):
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1 rank.")
    if zero not in (1, 2, 3):
        raise ValueError(f"zero={zero} must be 3, 2 or 1.")
    if loss_slice is not None and loss_slice < 1:
        raise ValueError(f"loss_slice={loss_slice} must be at least 1 token, or None.")
    if not 1 <= ranks <= context:
        raise ValueError(f"ranks={ranks} must be from 1 to context={context}.")
    if way not in WAYS:
        raise ValueError(f"way={way!r} is unknown: use one of {list(WAYS)}.")
    tokens = -(-context // ranks)
    row = 2 * sizes.num_key_value_heads * sizes.head_dim * 2 // tp  # key and value in bf16
    others = context - tokens
    if way == "halo":
        ends = [min(context, tokens * rank) for rank in range(ranks + 1)]
        plan = halo_plan(pattern, [b - a for a, b in pairwise(ends)])
        halo = max(halo.rows for halo in plan.halos)
        kept = max(halo.length - (halo.own[1] - halo.own[0]) for halo in plan.halos) * row
        keys, received = 2 * kept, 2 * halo * row
    elif way == "all-gather":
        kept = others * row
        keys, received = 2 * kept, 2 * kept
    else:  # two blocks in flight; backward, their gradients travel too, in fp32, and one step more to come home
        kept, several = 0, ranks > 1
        keys = several * (2 * tokens * row + 2 * tokens * 2 * row)
        received = 2 * others * row + several * context * 2 * row
    attended = PiPattern(context, 1, 0) if way == "dense ring" else pattern
    patterns = [attended] * sizes.num_hidden_layers
    flops = sum(model_flops(patterns, context, sizes, backward=True).values())
    flops += sum(flops for part, flops in model_flops(patterns, context, sizes).items() if part != "head")
    held = _held(sizes, tokens, dp * ranks, tp, zero, loss_slice, way, kept, keys)
    return Bill(
        state=STATE_BYTES * held.weights // held.shards,
        gradients=4 * held.weights // held.shards + (4 * held.weights if zero == 1 else 0),
        gathered=2 * (2 * held.in_layer + held.in_ends if zero == 3 else held.weights),
        activations=sizes.num_hidden_layers * held.hidden + held.angles,
        layer=held.feed_forward - kept,
        logits=held.logits,
        keys=keys,
        peaks=_peaks(held),
        received=received,
        flops=flops // (ranks * tp),
    )


def _held(
    sizes: Sizes,
    tokens: int,
    shards: int,
    tp: int,
    zero: int,
    loss_slice: int | None,
    way: Way,
    kept: int,
    keys: int,
) -> _Held:
    """Of a rank with so many tokens; `kept` are other ranks' keys until a layer's backward pass, `keys` during it."""
    hidden = 2 * tokens * sizes.hidden_size
    query, key = (2 * tokens * n * sizes.head_dim // tp for n in (sizes.num_attention_heads, sizes.num_key_value_heads))
    inner = 2 * tokens * sizes.intermediate_size // tp
    dense = way == "dense ring"
    # Kept for the backward pass: both norms' outputs, the sum between attention and feed-forward; queries, outputs of
    # the attention, of its skip band alone, and token by token for the projection; keys and values. Then the layer's
    # gradient, and at the product of the feed-forward both factors, the gate before its silu, and all the gradients.
    # Where tp leaves little of those, the two factors' gradients and three of the whole width outweigh them.
    outputs = (3 if dense else 4) * query
    feed_forward = 4 * hidden + outputs + 2 * key + max(6 * inner, 2 * inner + 3 * hidden) + kept
    # At the attention, of the layer are left the first norm's output and the gradient. Gradients of the output, the
    # queries, keys and values are new. A ring has copies of three tensors by chunks, and sums its queries' in fp32.
    of_ring = 7 * query if dense else 0
    attention = 2 * hidden + outputs + 2 * query + 4 * key + of_ring + keys
    at_once = min(tokens, loss_slice or tokens)
    return _Held(
        layers=sizes.num_hidden_layers,
        in_layer=layer_parameters(sizes) // tp,
        in_ends=2 * sizes.vocab_size * sizes.hidden_size,
        shards=shards,
        zero=zero,
        hidden=hidden,
        angles=2 * 4 * tokens * sizes.head_dim,  # cos and sin in fp32
        feed_forward=feed_forward,
        attention=attention,
        logits=LOGIT_BYTES * at_once * sizes.vocab_size,
        slices=-(-tokens // loss_slice) if loss_slice else 0,
    )


def fewest_ranks(
    sizes: Sizes, pattern: PiPattern, context: int, memory: int, way: Way, loss_slice: int | None = None
) -> int | None:
    """The fewest ranks, a power of two up to 4,096, on which the step fits into so many bytes a GPU."""
    counts = (1 << power for power in range(13))
    fits = (n for n in counts if n <= context and bill(sizes, pattern, context, n, way, loss_slice).bytes <= memory)
    return next(fits, None)
