"""Which layers of a pretrained decoder should stay dense: those whose conversion raises its loss most."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from pi_attention.convert.config import windows_of
from pi_attention.convert.model import PiConvertedForCausalLM, convert
from pi_attention.pattern import PiPattern, need_int
from pi_attention.stack import DENSE


def added_losses(
    model: PreTrainedModel, pattern: PiPattern, loss: Callable[[PiConvertedForCausalLM], float]
) -> dict[int, float]:
    """What each layer adds to the loss when it alone takes the pattern, by its index.

    Layers that keep a sliding window of their own are left out. The model is evaluated once more than it has layers.
    Its weights stay as they are; convert it afterwards, as before.

    Args:
        model: a decoder that `convert` takes.
        pattern: of the converted layer.
        loss: of a model, in nats a token, on a text longer than the pattern reaches.

    Raises:
        TypeError, ValueError, NotImplementedError: as `convert` does.

    Example::

        added = added_losses(model, pattern, lambda m: evaluate(m, blocks, limit=4).loss)
        model = convert(model, pattern, layers=[i for i in added if i not in neediest(added, 5)])
    """
    dense = loss(convert(model, DENSE))
    layers = [layer for layer, window in enumerate(windows_of(model.config)) if window is None]
    return {layer: loss(convert(model, pattern, layers=[layer])) - dense for layer in layers}


def neediest(added: dict[int, float], count: int) -> list[int]:
    """The layers of the largest added losses, in their order: keep these dense.

    Args:
        added: of `added_losses`.
        count: how many.

    Raises:
        TypeError, ValueError: count is no whole number, negative, or leaves no layer to convert.

    >>> neediest({0: 0.01, 1: 0.2, 2: 0.0, 3: 0.3}, 2)
    [1, 3]
    """
    need_int("count", count, 0, "that many layers stay dense")
    if count >= len(added):
        raise ValueError(f"count={count} leaves none of {len(added)} layers to convert: keep fewer dense.")
    return sorted(sorted(added, key=lambda layer: -added[layer])[:count])
