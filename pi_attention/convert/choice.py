"""Which layers of a pretrained decoder should stay dense: those that give most of the loss back."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from pi_attention.convert.config import windows_of
from pi_attention.convert.model import PiConvertedForCausalLM, convert
from pi_attention.pattern import PiPattern, need_int


def dense_gains(
    model: PreTrainedModel, pattern: PiPattern, loss: Callable[[PiConvertedForCausalLM], float]
) -> dict[int, float]:
    """By how much the loss falls where one layer stays dense and all others take the pattern, by the layer's index.

    Layers that keep a sliding window of their own are left out. The model is evaluated once more than it has layers.
    Its weights stay as they are; convert it afterwards, as before.

    Args:
        model: a decoder that `convert` takes.
        pattern: of the converted layers.
        loss: of a converted model, in nats a token, on a text longer than its window.

    Raises:
        TypeError, ValueError, NotImplementedError: as `convert` does, or a single layer could take the pattern.

    Example::

        gains = dense_gains(model, pattern, lambda m: evaluate(m, blocks, limit=4).loss)
        model = convert(model, pattern, layers=[i for i in gains if i not in largest(gains, 5)])
    """
    layers = [layer for layer, window in enumerate(windows_of(model.config)) if window is None]
    if len(layers) == 1:
        raise ValueError(f"layer {layers[0]} alone can take the pattern: there is none to choose.")
    sparse = loss(convert(model, pattern))
    return {dense: sparse - loss(convert(model, pattern, layers=[i for i in layers if i != dense])) for dense in layers}


def largest(gains: dict[int, float], count: int) -> list[int]:
    """The layers of the largest gains, in their order: keep these dense.

    Args:
        gains: of `dense_gains`.
        count: how many.

    Raises:
        TypeError, ValueError: count is no whole number, negative, or leaves no layer to convert.

    >>> largest({0: 0.01, 1: 0.2, 2: 0.0, 3: 0.3}, 2)
    [1, 3]
    """
    need_int("count", count, 0, "that many layers stay dense")
    if count >= len(gains):
        raise ValueError(f"count={count} leaves none of {len(gains)} layers to convert: keep fewer dense.")
    return sorted(sorted(gains, key=lambda layer: -gains[layer])[:count])
