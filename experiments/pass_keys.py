"""Pass keys in texts: each is said once, at a depth, and asked for at the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments.texts import Documents
from experiments.training import DEVICE, products
from pi_attention.data.tokenizers import beginning

NEEDLES = 8
"""Pass keys of a length and depth."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def asked(pieces: Documents, length: int, depth: float, tokenizer: Any, seed: int) -> tuple[Tensor, int]:
    """Texts [NEEDLES, length] that say a pass key at a depth, and end with it; and how many tokens the key has."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(10_000, 100_000, (NEEDLES,), generator=generator).tolist()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    said = [ids(f"\nThe pass key of these files is {key}.\n") for key in keys]
    ends = [ids(f"\nThe pass key of these files is {key}") for key in keys]
    opening = ids("\nThe pass key of these files is")
    answer = len(ends[0]) - len(opening)
    first = beginning(tokenizer)
    rows = []
    for number, (statement, end) in enumerate(zip(said, ends, strict=True)):
        room = length - len(first) - len(statement) - len(end)
        text = pieces[number % len(pieces)][:room].tolist()
        place = round(depth * room)
        rows.append([*first, *text[:place], *statement, *text[place:], *end])
    if any(len({len(row) for row in kind}) > 1 for kind in (said, ends)):
        raise ValueError("the tokenizer writes five digits in different numbers of tokens: pass keys have one length.")
    if any(len(row) != length for row in rows):
        raise ValueError(f"a text is shorter than length={length} tokens: take longer texts or a shorter length.")
    return torch.tensor(rows), answer


@torch.no_grad()
def needles(model: Any, pieces: Documents, lengths: list[int], tokenizer: Any) -> dict[str, list[float]]:
    """The share of pass keys of which every token is the likeliest one: by length, for each of `DEPTHS`."""
    found: dict[str, list[float]] = {}
    for length in lengths:
        found[str(length)] = []
        for depth in DEPTHS:
            ids, answer = asked(pieces, length, depth, tokenizer, seed=length)
            right = 0
            for row in ids.to(DEVICE).split(1):
                with products():
                    logits = model(input_ids=row, use_cache=False, logits_to_keep=answer + 1).logits[:, :-1]
                right += int((logits.argmax(-1) == row[:, -answer:]).all())
            found[str(length)].append(right / len(ids))
    return found
