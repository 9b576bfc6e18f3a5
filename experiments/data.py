"""The data sets of the experiments, from a folder `data/`; docs/experiments.md says where each comes from.

Nothing here is downloaded or committed. What is costly to prepare is kept beside the data, in `data/prepared`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor


def need(path: Path, how: str) -> Path:
    """The path, or an error that says how to get it."""
    if not path.exists():
        raise FileNotFoundError(f"data={str(path)!r} does not exist: {how}.")
    return path


def prepared(data: Path, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays from `data/prepared/name.npz`, made first if they are not there; several processes may ask at once."""
    path = data / "prepared" / f"{name}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True, parents=True)
        part = path.with_suffix(f".{uuid4().hex}.npz")
        np.savez(part, **make())
        part.replace(path)
    with np.load(path) as arrays:
        return dict(arrays)


def joined(texts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Texts with questions as one, one after the other; answers count from its beginning."""
    text, questions = "", []
    for piece in texts:
        for entry in piece["questions"]:
            answers = [answer | {"start": len(text) + answer["start"]} for answer in entry["answers"]]
            questions.append(entry | {"answers": answers})
        text += piece["text"]
    return {"text": text, "questions": questions}


def squad(path: Path) -> list[dict[str, Any]]:
    """Articles of a file in SQuAD's format: {"text", "questions": [{"question", "answers": [{"start", "text"}]}]}.

    The paragraphs of an article are joined by newlines, and the answers' character offsets count from its beginning.
    """
    need(path, "SQuAD v1.1's dev-v1.1.json, or SQuADShifts' files, gzipped")

    def asked(entry: dict[str, Any]) -> dict[str, Any]:
        answers = [{"start": answer["answer_start"], "text": answer["text"]} for answer in entry["answers"]]
        return {"question": entry["question"], "answers": answers}

    def piece(paragraph: dict[str, Any]) -> dict[str, Any]:
        return {"text": paragraph["context"] + "\n", "questions": [asked(entry) for entry in paragraph["qas"]]}

    articles = json.loads(gzip.decompress(path.read_bytes()))["data"]
    return [joined(map(piece, article["paragraphs"])) for article in articles]


Captioned = tuple[Tensor, list[str], list[str]]
"""Images uint8 [N, 64, 64, 3], captions, and names: what stands before their first "_" tells concepts apart."""


def open_clip_art(data: Path) -> Captioned:
    """Drawings of Open Clip Art with their titles."""
    how = "put openclipart64.npz and openclipart_pairs.jsonl there"
    lines = need(data / "openclipart" / "openclipart_pairs.jsonl", how).read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    with np.load(need(data / "openclipart" / "openclipart64.npz", how)) as arrays:
        pixels = torch.from_numpy(arrays["x"][[pair["row"] for pair in pairs]])
    return pixels, [pair["caption"] for pair in pairs], [pair["id"].rpartition("/")[2] for pair in pairs]


def emoji(data: Path) -> Captioned:
    """Emoji without skin tones in the designs of Google and Twitter, on white, with their labels and tags."""
    from PIL import Image

    folder = data / "emoji"
    how = "put emojibase-data's en/compact.json there, and emoji-datasource's img/VENDOR/64 as VENDOR/64"
    entries = json.loads(need(folder / "compact.json", how).read_text(encoding="utf-8"))

    def make() -> dict[str, np.ndarray]:
        pixels, of_entry, vendors = [], [], []
        for vendor in ("google", "twitter"):
            files = {path.stem.replace("-fe0f", ""): path for path in need(folder / vendor / "64", how).glob("*.png")}
            for number, entry in enumerate(entries):
                path = files.get(entry["hexcode"].lower().replace("-fe0f", ""))
                if path is None:
                    continue
                drawn = Image.open(path).convert("RGBA")
                canvas = Image.new("RGBA", (64, 64), "white")
                canvas.alpha_composite(drawn.resize((64, 64)))
                pixels.append(np.asarray(canvas.convert("RGB")))
                of_entry.append(number)
                vendors.append(vendor)
        return {"pixels": np.stack(pixels), "entries": np.array(of_entry), "vendors": np.array(vendors)}

    arrays = prepared(data, "emoji", make)
    chosen = [entries[number] for number in arrays["entries"]]
    captions = [", ".join([entry["label"], *entry.get("tags", [])]) for entry in chosen]
    names = [f"{entry['hexcode']}_{vendor}" for entry, vendor in zip(chosen, arrays["vendors"], strict=True)]
    return torch.from_numpy(arrays["pixels"]), captions, names


IMAGES: dict[str, Callable[[Path], Captioned]] = {"openclipart": open_clip_art, "emoji": emoji}


def karpathy(listing: Path, images: Path, part: str) -> list[tuple[Path, list[str]]]:
    """Image files and captions of a part ("train", "val", "test") of Flickr30K or MSCOCO by Karpathy's splits.

    Args:
        listing: `dataset_flickr30k.json` or `dataset_coco.json` (Karpathy & Fei-Fei, arXiv 1412.2306).
        images: folder of the images; MSCOCO's have a `filepath` inside it.
        part: for MSCOCO, "train" includes "restval", as is usual.
    """
    need(listing, "download Karpathy's caption splits")
    parts = {"train", "restval"} if part == "train" else {part}
    return [
        (images / entry.get("filepath", "") / entry["filename"], [line["raw"] for line in entry["sentences"]])
        for entry in json.loads(listing.read_text(encoding="utf-8"))["images"]
        if entry["split"] in parts
    ]
