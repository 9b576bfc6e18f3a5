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

STATE_BYTES = 16
"""Of a parameter: fp32 weight and gradient, two fp32 moments."""
LOGIT_BYTES = 16
"""Of a logit: bf16 value and gradient, and the loss's fp32 copy, log-softmax and gradient."""

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
        state: bytes of parameters, gradients and optimizer.
        gathered: bytes of whole bf16 weights: the embeddings, a layer in use and one on its way.
        activations: bytes of the hidden states kept between layers.
        layer: bytes of one layer's activations while it is recomputed.
        logits: bytes.
        keys: bytes of keys and values of other ranks in one layer, and of the gradients that go back to them.
        received: bytes that a rank receives for one layer, forward and backward.
        flops: operations of a step, the recomputation of the layers included.
    """

    state: int
    gathered: int
    activations: int
    layer: int
    logits: int
    keys: int
    received: int
    flops: int

    @property
    def bytes(self) -> int:
        """At the peak: either the logits or a layer, on top of what stays."""
        return self.state + self.gathered + self.activations + max(self.logits, self.layer + self.keys)


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
        keys = 2 * max(halo.length - (halo.own[1] - halo.own[0]) for halo in plan.halos) * row
        received = 2 * halo * row
    elif way == "all-gather":
        keys, received = 2 * others * row, 2 * others * row
    else:  # two blocks in flight; backward, their gradients travel too, in fp32, and one step more to come home
        several = ranks > 1
        keys = several * (2 * tokens * row + 2 * tokens * 2 * row)
        received = 2 * others * row + several * context * 2 * row
    attended = PiPattern(context, 1, 0) if way == "dense ring" else pattern
    patterns = [attended] * sizes.num_hidden_layers
    flops = sum(model_flops(patterns, context, sizes, backward=True).values())
    flops += sum(flops for part, flops in model_flops(patterns, context, sizes).items() if part != "head")
    heads = 2 * (sizes.num_attention_heads + sizes.num_key_value_heads) * sizes.head_dim
    split = (heads + 3 * sizes.intermediate_size) // tp
    layer, embeddings = layer_parameters(sizes) // tp, 2 * sizes.vocab_size * sizes.hidden_size
    own = sizes.num_hidden_layers * layer + embeddings  # that FSDP shards over dp · ranks
    return Bill(
        state=STATE_BYTES * own // (dp * ranks) + 4 * own * (zero == 1),
        gathered=2 * (2 * layer + embeddings if zero == 3 else own),
        activations=2 * tokens * sizes.hidden_size * sizes.num_hidden_layers,
        layer=2 * 2 * tokens * (split + 4 * sizes.hidden_size),
        logits=LOGIT_BYTES * min(tokens, loss_slice or tokens) * sizes.vocab_size,
        keys=keys,
        received=received,
        flops=flops // (ranks * tp),
    )


def fewest_ranks(
    sizes: Sizes, pattern: PiPattern, context: int, memory: int, way: Way, loss_slice: int | None = None
) -> int | None:
    """The fewest ranks, a power of two up to 4,096, on which the step fits into so many bytes a GPU."""
    counts = (1 << power for power in range(13))
    fits = (n for n in counts if n <= context and bill(sizes, pattern, context, n, way, loss_slice).bytes <= memory)
    return next(fits, None)
