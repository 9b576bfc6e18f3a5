"""What one rank holds while a sequence is shared: weights, activations, keys of other ranks, and when they add up."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from pi_attention.accounting import Sizes
from pi_attention.distributed.plan import halo_plan
from pi_attention.pattern import PiPattern

Way = Literal["halo", "all-gather", "dense ring"]
WAYS: tuple[Way, ...] = ("halo", "all-gather", "dense ring")

STATE_BYTES = 12
"""Of a parameter: fp32 weight and two fp32 moments. Gradients come into being layer by layer, see `Rank.peaks`."""
LOGIT_BYTES = 12
"""Of a logit, where the loss is differentiated: in fp32 the log-softmax, its gradient and that of the logits.

The bf16 logits and their fp32 copy are freed by then, and the bf16 gradient is made after the log-softmax is freed."""


def layer_parameters(sizes: Sizes) -> int:
    """Weights of one layer's products."""
    attention = (2 * sizes.num_attention_heads + 2 * sizes.num_key_value_heads) * sizes.head_dim
    gate = (sizes.gate_features + sizes.num_attention_heads) * sizes.gate_width
    return sizes.hidden_size * (attention + 3 * sizes.intermediate_size) + gate


class Keys(NamedTuple):
    """Keys and values of other ranks in one layer, in bytes."""

    kept: int
    """Until the layer's backward pass."""
    held: int
    """During that of its attention, with the gradients that go back."""
    received: int
    """Forward and backward."""


def keys_of_others(way: Way, pattern: PiPattern, context: int, ranks: int, row: int) -> Keys:
    """Of the rank that needs most; `row` is the bytes of a position's keys and values in bf16."""
    tokens = -(-context // ranks)
    others = (context - tokens) * row
    if way == "halo":
        ends = [min(context, tokens * rank) for rank in range(ranks + 1)]
        halos = halo_plan(pattern, [b - a for a, b in pairwise(ends)]).halos
        kept = max(halo.length - (halo.own[1] - halo.own[0]) for halo in halos) * row
        return Keys(kept, 2 * kept, 2 * max(halo.rows for halo in halos) * row)
    if way == "all-gather":
        return Keys(others, 2 * others, 2 * others)
    if ranks == 1:
        return Keys(0, 0, 0)
    # Two blocks are in flight; backward, their gradients travel too, in fp32, and one step more to come home.
    return Keys(0, 6 * tokens * row, 2 * others + 2 * context * row)


@dataclass(frozen=True)
class Rank:
    """One rank and its share: numbers of weights, and bytes of activations."""

    sizes: Sizes
    tokens: int
    shards: int
    tp: int
    zero: int
    loss_slice: int | None
    ring: bool
    """Whether keys come by the dense ring."""
    keys: tuple[Keys, ...]
    """Of other ranks, in each layer."""

    @property
    def in_layer(self) -> int:
        """Weights of a layer."""
        return layer_parameters(self.sizes) // self.tp

    @property
    def in_ends(self) -> int:
        """Of both embeddings."""
        return 2 * self.sizes.vocab_size * self.sizes.hidden_size

    @property
    def weights(self) -> int:
        """Those that FSDP shards."""
        return self.sizes.num_hidden_layers * self.in_layer + self.in_ends

    @property
    def state(self) -> int:
        """Bytes of weights and moments."""
        return STATE_BYTES * self.weights // self.shards

    @property
    def gradients(self) -> int:
        """When all exist; for ZeRO-1 with the sums of the batches before."""
        return 4 * self.weights // self.shards + (4 * self.weights if self.zero == 1 else 0)

    @property
    def hidden(self) -> int:
        """Hidden states between two layers."""
        return 2 * self.tokens * self.sizes.hidden_size

    @property
    def angles(self) -> int:
        """cos and sin in fp32."""
        return 2 * 4 * self.tokens * self.sizes.head_dim

    @property
    def logits(self) -> int:
        """Those that exist together."""
        return LOGIT_BYTES * min(self.tokens, self.loss_slice or self.tokens) * self.sizes.vocab_size

    @property
    def query(self) -> int:
        """The queries of one layer."""
        return 2 * self.tokens * self.sizes.num_attention_heads * self.sizes.head_dim // self.tp

    @property
    def key(self) -> int:
        """The keys of one layer, as many as the values."""
        return 2 * self.tokens * self.sizes.num_key_value_heads * self.sizes.head_dim // self.tp

    @property
    def outputs(self) -> int:
        """Queries, outputs of the attention, of its skip band alone, and token by token for the projection."""
        return (3 if self.ring else 4) * self.query

    @property
    def feed_forward(self) -> int:
        """Of a layer while its feed-forward network is differentiated, without keys of other ranks.

        Kept for the backward pass: both norms' outputs, the sum between attention and feed-forward, `outputs`, keys
        and values. Then the layer's gradient, and at the product of the feed-forward both factors, the gate before
        its silu, and all the gradients. Where tp leaves little of those, the two factors' gradients and three of the
        whole width outweigh them.
        """
        inner = 2 * self.tokens * self.sizes.intermediate_size // self.tp
        product = max(6 * inner, 2 * inner + 3 * self.hidden)
        return 4 * self.hidden + self.outputs + 2 * self.key + product

    @property
    def attention(self) -> int:
        """Of a layer while its attention is differentiated, without keys of other ranks.

        Left are the first norm's output and the gradient. Gradients of the output, the queries, keys and values are
        new. A ring has copies of three tensors by chunks, and sums its queries' in fp32.
        """
        of_ring = 7 * self.query if self.ring else 0
        return 2 * self.hidden + self.outputs + 2 * self.query + 4 * self.key + of_ring

    def peaks(self) -> dict[str, int]:
        """Bytes at the peaks of a step, all in the backward pass: of the loss, a layer's halves, and sums over ranks.

        From the last layer to the first, hidden states are freed and gradients come into being. While a layer is
        differentiated, the sums of the one after it are on their way.
        """
        layers = self.sizes.num_hidden_layers
        whole = 2 * self.weights if self.zero < 3 else 0  # bf16, between forward and backward too
        stays = self.state + self.angles + whole
        stays += 4 * self.weights if self.zero == 1 else 0  # sums of the batches before
        ends, next_layer = (0, 0) if whole else (2 * self.in_ends, 2 * self.in_layer)
        head = self.in_ends  # bf16 gradient of the output's embedding, summed with the input's at last
        summed = (2 + 4) * self.in_layer  # a layer's bf16 gradients and their fp32 copy, which ranks sum
        loss = stays + (layers + 2) * self.hidden + self.logits  # two: before and after the last norm
        if self.loss_slice:  # then the head is called within the model, whose ends FSDP keeps gathered
            loss += ends + (head if self.tokens > self.loss_slice else 0)
        feed_forward, attention, sums = 0, 0, 0
        for left, keys in enumerate(self.keys, 1):
            done = layers - left
            base = stays + ends + head + left * self.hidden + 4 * done * self.in_layer // self.shards
            on_their_way = 4 * self.in_layer if done else 0
            in_layer = base + 2 * next_layer + on_their_way  # its own weights and the next one's
            feed_forward = max(feed_forward, in_layer + self.feed_forward + keys.kept)
            attention = max(attention, in_layer + self.attention + keys.held)
            sums = max(sums, base + 2 * next_layer + summed)  # the next one's weights, and the buffer that brought them
        of_ends = stays + 4 * self.weights // self.shards + (2 + 4) * self.in_ends
        return {
            "the loss": loss,
            "a layer's feed-forward": feed_forward,
            "a layer's attention": attention,
            "a layer's sums": sums,
            "the embeddings' sums": of_ends,
        }
