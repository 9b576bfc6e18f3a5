"""Which layers of a pretrained decoder should stay dense: those that give most of the loss back."""

from __future__ import annotations

import math
from collections.abc import Callable

from transformers import PreTrainedModel

from pi_attention.convert.config import free_layers
from pi_attention.convert.conversion import convert, need_convertible
from pi_attention.convert.model import PiConvertedForCausalLM
from pi_attention.pattern import PiPattern, need_int


def dense_gains(
    model: PreTrainedModel, pattern: PiPattern, loss: Callable[[PiConvertedForCausalLM], float]
) -> dict[int, float]:
    """By how much the loss falls where one layer stays dense and all others take the pattern, by the layer's index.

    Layers that keep a sliding window of their own are left out; the loss is taken once more than there are others. The
    weights of the model stay as they are. It has the pattern of the last trial until it is converted again, and is left
    in training or evaluation as `loss` leaves it.

    Args:
        model: a decoder that `convert` takes.
        pattern: of the converted layers.
        loss: of a converted model, in nats a token, on a text longer than its window.

    Raises:
        TypeError, ValueError, NotImplementedError: as `convert` does, or fewer than two layers could take the pattern.

    Example::

        gains = dense_gains(model, pattern, lambda m: evaluate(m, blocks, limit=4).loss)
        model = convert(model, pattern, layers=[i for i in gains if i not in neediest(gains, 5)])
    """
    need_convertible(model, pattern, gate=False)
    layers = free_layers(model.config)
    if len(layers) < 2:
        raise ValueError(f"layers that can take the pattern are {layers}: there is none to choose.")
    sparse = loss(convert(model, pattern))
    return {dense: sparse - loss(convert(model, pattern, layers=[i for i in layers if i != dense])) for dense in layers}


def neediest(gains: dict[int, float], count: int) -> list[int]:
    """The layers of the largest gains, in their order: keep these dense. A gain may be negative.

    Args:
        gains: of `dense_gains`.
        count: how many.

    Raises:
        TypeError, ValueError: count is no whole number, negative, or leaves no layer to convert; or a gain is NaN.

    >>> neediest({0: 0.01, 1: 0.2, 2: 0.0, 3: 0.3}, 2)
    [1, 3]
    """
    need_int("count", count, 0, "that many layers stay dense")
    if count >= len(gains):
        raise ValueError(f"count={count} leaves none of {len(gains)} layers to convert: keep fewer dense.")
    if any(math.isnan(gain) for gain in gains.values()):
        raise ValueError("a gain is NaN, so the layers have no order: the loss of some conversion is not finite.")
    return sorted(sorted(gains, key=lambda layer: -gains[layer])[:count])
