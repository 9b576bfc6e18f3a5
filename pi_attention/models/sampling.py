"""Sampling in continuous batching, each request by settings and random numbers of its own."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pi_attention.models.paged import ContinuousBatchingLogitsProcessor


class RequestSampling(ContinuousBatchingLogitsProcessor):
    """Leaves the drawn token alone in a row of logits; a row without a temperature stays as it is, for the argmax.

    A token is drawn from its request's seed and the length of the text so far. So a request's text does not depend on
    the others in its batch.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {"temperature": float, "top_k": int, "top_p": float, "seed": int}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._rows: list[tuple[dict[str, Any], int]] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Nothing travels by tensor."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Keep the settings of the requests, and how long each text is."""
        states = [request.state for request in requests_with_new_token]
        self._rows = [(s.logit_processor_kwargs, len(s.initial_tokens) + len(s.generated_tokens)) for s in states]
        return torch.zeros(len(states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Logits [rows, vocabulary] with one finite entry in each row that is sampled.

        Rows behind those of the requests belong to prompts that are not yet read, and give no token.
        """
        for row, (settings, length) in zip(scores, self._rows, strict=False):
            if settings.get("temperature"):
                token = draw(row, **settings, step=length)
                row.fill_(-torch.inf)[token] = 0.0
        return scores


def draw(row: Tensor, temperature: float, top_k: int, top_p: float, seed: int, step: int) -> Tensor:
    """A token by the logits [vocabulary], as `generate` would sample it."""
    warpers: Any = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    probabilities = warpers(None, row[None])[0].softmax(-1)
    mixed = random.Random(f"{seed} {step}").getrandbits(32)  # PyTorch's generator on a CPU reads no more bits
    generator = torch.Generator(row.device).manual_seed(mixed)
    return torch.multinomial(probabilities, 1, generator=generator)
