"""Image–text retrieval: two towers, contrastive; image patches and caption bytes are sequences of one kind of block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.classification import mean_of
from experiments.data import IMAGES
from experiments.experiment import Experiment, Result, Scale, Settings
from experiments.training import DEVICE, fit, products, segments
from experiments.variants import CLAIMED, config, specialise
from pi_attention.models import PiConfig, PiModel

CAPTION = 64  # bytes
WIDTH = 128  # of the shared space


class Tower(nn.Module):
    """A bidirectional PiModel, the mean of its outputs, and a projection to a unit vector."""

    def __init__(self, config: PiConfig, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.body = PiModel(config)
        self.project = nn.Linear(config.hidden_size, WIDTH, bias=False)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, …] with a mask [B, T] of what is no padding -> [B, WIDTH]."""
        ids = None if mask is None else segments(mask)
        hidden = self.body(inputs_embeds=self.embed(inputs), segment_ids=ids).last_hidden_state
        mean = hidden.mean(1) if mask is None else mean_of(hidden, mask)
        return F.normalize(self.project(mean).float(), dim=-1)


class TwoTowers(nn.Module):
    """InfoNCE in both directions with a learned temperature (CLIP, arXiv 2103.00020)."""

    def __init__(self, config: PiConfig, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.image = Tower(config, nn.Linear(3 * patch * patch, config.hidden_size))
        self.text = Tower(config, nn.Embedding(256, config.hidden_size))
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def vectors(self, pixels: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of images uint8 [B, H, W, 3] and of caption bytes [B, CAPTION], zeros after the end."""
        side = pixels.shape[1] // self.patch
        patches = pixels.view(-1, side, self.patch, side, self.patch, 3).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.image(patches.float() / 127.5 - 1), self.text(captions, captions != 0)

    def forward(self, pixels: Tensor, captions: Tensor) -> SimpleNamespace:
        """The loss of matching pairs."""
        images, texts = self.vectors(pixels, captions)
        scores = self.scale.exp().clamp(max=100) * images @ texts.T
        target = torch.arange(len(scores), device=scores.device)
        return SimpleNamespace(loss=(F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2)


def caption_bytes(captions: list[str]) -> Tensor:
    """[N, CAPTION] bytes, zeros after the end."""
    rows = torch.zeros(len(captions), CAPTION, dtype=torch.long)
    for row, caption in zip(rows, captions, strict=True):
        ids = torch.tensor(list(caption.lower().encode()[:CAPTION]) or [32])
        row[: len(ids)] = ids
    return rows


def split(names: list[str]) -> dict[str, Tensor]:
    """Rows for training, validation and test (80 : 10 : 10): all drawings of a theme's name stay together."""
    of_name = [name.split("_")[0] for name in names]
    themes = sorted(set(of_name))
    order = torch.randperm(len(themes), generator=torch.Generator().manual_seed(0)).tolist()
    tenth = {theme: 10 * place // len(themes) for theme, place in zip(themes, order, strict=True)}
    of_row = torch.tensor([tenth[theme] for theme in of_name])
    parts = {"validation": of_row == 8, "test": of_row == 9, "training": of_row < 8}
    return {part: chosen.nonzero()[:, 0] for part, chosen in parts.items()}


def recalls(scores: Tensor, at: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """R@k of score matrices [N, N] whose matches lie on the diagonal."""
    rank = (~(scores < scores.diagonal()[:, None])).sum(1) - 1  # a tie, or a score that is no number, is a miss
    return {f"R@{k}": float((rank < k).float().mean()) for k in at}


def measure(settings: Settings, data: Path) -> Result:
    """Train the towers; recall of held-out drawings both ways, averaged in "test" and "validation" (R@1)."""
    torch.manual_seed(settings["seed"])
    generator = torch.Generator().manual_seed(1 + settings["seed"])
    pixels, captions, names = IMAGES[settings["images"]](data)
    ids, parts = caption_bytes(captions), split(names)
    for part in ("validation", "test"):  # one image of each caption, since equal captions cannot be told apart
        rows = parts[part].tolist()
        parts[part] = torch.tensor(sorted({captions[row]: row for row in reversed(rows)}.values()))
    made = config(settings, vocab_size=1, causal=False)
    model = specialise(TwoTowers(made, settings["patch"]).to(DEVICE), settings)

    def batches() -> Iterator[dict[str, Tensor]]:
        while True:  # whole batches only
            order = torch.randperm(len(parts["training"]), generator=generator)
            count = len(order) // settings["batch"] * settings["batch"]
            for rows in parts["training"][order[:count]].split(settings["batch"]):
                yield {"pixels": pixels[rows], "captions": ids[rows]}

    last = fit(model, batches(), steps=settings["steps"], rate=settings["rate"])

    @torch.no_grad()
    def scores(part: str) -> Tensor:
        found = []
        for rows in parts[part][: settings["held out"]].split(64):
            with products():
                found.append(model.vectors(pixels[rows].to(DEVICE), ids[rows].to(DEVICE)))
        images, texts = (torch.cat(vectors).float().cpu() for vectors in zip(*found, strict=True))
        return images @ texts.T

    both = {part: {"to text": recalls(s := scores(part)), "to image": recalls(s.T)} for part in ("validation", "test")}
    mean = {part: (ways["to text"]["R@1"] + ways["to image"]["R@1"]) / 2 for part, ways in both.items()}
    count = sum(p.numel() for p in model.parameters())
    return {**mean, "recall": both["test"], "training loss": last, "parameters": count}


def cells(scale: Scale) -> list[Settings]:
    """The main variants and coordinated heads; 1,024 patches of an image."""
    if scale == "laptop":
        return []
    sizes = {"hidden": 192, "layers": 4, "heads": 4, "context": 1024, "patch": 2, "batch": 128, "steps": 500,
             "held out": 400, "window": 32, "period": 32, "skips": 16}  # fmt: skip
    if scale == "smoke":
        sizes |= {"hidden": 16, "layers": 1, "heads": 2, "context": 64, "patch": 8, "batch": 4, "steps": 2}
        sizes |= {"held out": 16, "window": 8, "period": 8, "skips": 4}
    return [{"images": images, "variant": variant, **sizes} for images in IMAGES for variant in CLAIMED]


EXPERIMENT = Experiment(
    name="image_text",
    title="Image–text retrieval",
    metric="R@1, mean of both ways",
    better="higher",
    cells=cells,
    measure=measure,
    rates=(1e-3,),
)
