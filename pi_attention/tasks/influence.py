"""Which inputs a trained or untrained model's output depends on, measured by its Jacobian."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pi_attention.receptive_field import ReceptiveField, receptive_field


@dataclass(frozen=True)
class Influence:
    """How far one position's output depends on each input embedding.

    Args:
        norm: [S], the norm of a random projection's gradient by position; 0 where the output does not depend on it.
        field: what the patterns predict.
    """

    norm: Tensor
    field: ReceptiveField

    @property
    def agrees(self) -> bool:
        """Whether the gradient is non-zero on exactly the predicted positions."""
        return self.wrong == 0

    @property
    def wrong(self) -> int:
        """How many positions contradict the prediction."""
        predicted = torch.tensor([hops >= 0 for hops in self.field.hops()])
        return int((predicted != (self.norm > 0)).sum())

    def by_hops(self) -> list[tuple[int, int, float]]:
        """For each number of layers: it, positions that need so many, and the median of their gradients' norms."""
        hops = torch.tensor(self.field.hops())
        found = []
        for number in range(self.field.layers + 1):
            norms = self.norm[hops == number]
            if len(norms):
                found.append((number, len(norms), float(norms.median())))
        return found


def influence(model: Any, input_ids: Tensor, query: int | None = None, *, seed: int = 0) -> Influence:
    """The Jacobian of a position's final hidden state with respect to every input embedding (arXiv 2511.10696, § 6).

    Computed in fp64, because what has come through many layers is small; one random direction of the output stands
    for all, which misses a dependence with probability zero.

    Args:
        model: a `PiForCausalLM` or another model over a `PiModel` in `.model`; it is left as it was.
        input_ids: [1, S].
        query: the position; the last one (causal) or the middle one by default.
        seed: of the direction.
    """
    field = receptive_field(model.config.patterns(), input_ids.shape[1], query)
    double = copy.deepcopy(model).double().eval()
    embeddings = double.get_input_embeddings()(input_ids).detach().requires_grad_()
    hidden = double.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0, field.query]
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed), dtype=hidden.dtype)
    (gradient,) = torch.autograd.grad(hidden @ direction.to(hidden.device), embeddings)
    return Influence(gradient[0].norm(dim=-1).cpu(), field)
