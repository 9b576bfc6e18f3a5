"""Classification of token sequences, which ListOps and the other tasks of the Long Range Arena share."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.experiment import Result, Settings
from experiments.training import DEVICE, fit, products, segments
from experiments.variants import config, specialise
from pi_attention.models import PiConfig, PiModel

PAD = 0


class Classifier(nn.Module):
    """A bidirectional PiModel with a linear head on a token put before the sequence, as in the Long Range Arena.

    With `mean`, the head reads the mean over all tokens instead.
    """

    def __init__(self, config: PiConfig, classes: int, *, mean: bool = False) -> None:
        super().__init__()
        self.body = PiModel(config)
        self.head = nn.Linear(config.hidden_size, classes)
        self.first = config.vocab_size - 1
        self.mean = mean

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        """Loss and logits [B, classes] of input_ids [B, T], PAD on the right, and labels [B]."""
        ids = F.pad(input_ids, (1, 0), value=self.first)
        present = ids != PAD
        hidden = self.body(ids, segment_ids=segments(present)).last_hidden_state
        logits = self.head(mean_of(hidden, present) if self.mean else hidden[:, 0])
        return SimpleNamespace(loss=F.cross_entropy(logits.float(), labels), logits=logits)


def mean_of(hidden: Tensor, present: Tensor) -> Tensor:
    """Mean [B, D] of hidden states [B, T, D] over the tokens of a mask [B, T]."""
    weight = present.to(hidden.dtype)
    return (hidden * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)


def classify(settings: Settings, arrays: dict[str, np.ndarray], *, vocabulary: int, classes: int) -> Result:
    """Train a bidirectional classifier of one variant; "validation" and "test" are accuracies.

    Args:
        settings: of the row; "batch", "steps", "rate", "seed" beside those of `config`. Where "pooling" is "mean",
            the classifier reads the mean over all tokens.
        arrays: "training ids" [N, T], padded on the right with PAD, and "training classes" [N]; the same for
            "validation" and "test".
        vocabulary: number of ids.
        classes: number of classes.
    """
    torch.manual_seed(settings["seed"])
    generator = torch.Generator().manual_seed(1 + settings["seed"])
    made = config(settings, vocab_size=vocabulary + 1, pad_token_id=PAD, causal=False)
    mean = settings.get("pooling") == "mean"
    model = specialise(Classifier(made, classes, mean=mean).to(DEVICE), settings)

    def batch_of(part: str, rows: Tensor) -> dict[str, Tensor]:
        ids = torch.from_numpy(arrays[f"{part} ids"][rows.numpy()]).long()
        labels = torch.from_numpy(arrays[f"{part} classes"][rows.numpy()]).long()
        return {"input_ids": ids, "labels": labels}

    def batches() -> Iterator[dict[str, Tensor]]:
        count, batch = len(arrays["training ids"]), settings["batch"]
        while True:  # whole batches only
            for rows in torch.randperm(count, generator=generator)[: count // batch * batch].split(batch):
                yield batch_of("training", rows)

    last = fit(model, batches(), steps=settings["steps"], rate=settings["rate"])

    @torch.no_grad()
    def accuracy(part: str) -> float:
        right, count = 0, len(arrays[f"{part} ids"])
        for rows in torch.arange(count).split(settings["batch"]):
            batch = {name: value.to(DEVICE) for name, value in batch_of(part, rows).items()}
            with products():
                right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        return right / count

    found = {part: accuracy(part) for part in ("validation", "test")}
    return {**found, "training loss": last, "parameters": sum(p.numel() for p in model.parameters())}
