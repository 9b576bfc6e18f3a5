"""Documents into blocks of equal length, with segment ids that keep the documents of a block apart."""

from __future__ import annotations

import random
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pi_attention.data.tokenizers import beginning

IGNORE = -100  # the label that transformers' losses leave out


def hold_out(documents: list[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Split documents into training and validation: whole documents if there are at least ten, else each one's end."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction must be above 0 and below 1, got {fraction}.")
    if len(documents) >= 10:
        order = list(range(len(documents)))
        random.Random(seed).shuffle(order)
        target, held = fraction * sum(map(len, documents)), set()
        size = 0
        for index in order[:-1]:
            if size >= target:
                break
            held.add(index)
            size += len(documents[index])
        return [d for i, d in enumerate(documents) if i not in held], [documents[i] for i in sorted(held)]
    cuts = [max(1, round(len(document) * (1 - fraction))) for document in documents]
    pairs = list(zip(documents, cuts, strict=True))
    return [d[:cut] for d, cut in pairs], [d[cut:] for d, cut in pairs if d[cut:]]


class PackedBlocks(Dataset[dict[str, Tensor]]):
    """Blocks of `context` tokens cut from documents laid end to end, each followed by the end-of-document token.

    A document begins with what the tokenizer puts before a text, which Llama's and Gemma's models need.

    A block is a dict of input_ids, segment_ids and labels, [context] each; the labels leave out the first token of
    each document, which no earlier token of its segment predicts. The last, incomplete block is dropped.

    Text is never read as a control token: what spells one in a document is tokenized as the characters that it is.

    Raises:
        ValueError: the context is below 1, there is too little text, or the tokenizer has no end-of-document token.
    """

    def __init__(self, documents: list[str], tokenizer: Any, context: int) -> None:
        if context < 1:
            raise ValueError(f"context must be at least 1 token, got {context}.")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, which separates documents: set one and save it.")
        if not documents:
            raise ValueError(f"there is no text, so no block of context={context}: use more data.")
        first = beginning(tokenizer)
        ids, owner = [], []
        tokenized = tokenizer(documents, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for number, tokens in enumerate(tokenized):
            ids.append(np.asarray([*first, *tokens, tokenizer.eos_token_id], dtype=np.int32))
            owner.append(np.full(len(ids[-1]), number, dtype=np.int32))
        self.tokens = np.concatenate(ids)
        self.document = np.concatenate(owner)
        self.of_text = len(self.tokens) - len(first) * len(documents)
        self.bytes = sum(len(document.encode()) for document in documents)
        self.context = context
        if len(self.tokens) < context:
            raise ValueError(
                f"the text has {len(self.tokens)} tokens, fewer than one block of context={context}: "
                "use more data or a shorter context."
            )

    def cut(self, context: int) -> PackedBlocks:
        """The same text in blocks of at most so many tokens."""
        shorter = copy(self)
        shorter.context = min(context, self.context)
        return shorter

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the text by number of tokens, those before the documents left out."""
        return self.bytes / self.of_text

    def __len__(self) -> int:
        return len(self.tokens) // self.context

    def _place(self, index: int) -> slice:
        return slice(index * self.context, (index + 1) * self.context)

    def predicted(self, index: int) -> int:
        """Tokens of a block that an earlier one of their document predicts."""
        document = self.document[self._place(index)]
        return int((document[1:] == document[:-1]).sum())

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self._place(index)
        input_ids = torch.from_numpy(self.tokens[block].astype(np.int64))
        segment_ids = torch.from_numpy(self.document[block] - self.document[block.start])
        labels = input_ids.clone()
        labels[1:][segment_ids[1:] != segment_ids[:-1]] = IGNORE
        return {"input_ids": input_ids, "segment_ids": segment_ids, "labels": labels}


def blocks_named(what: str, documents: list[str], tokenizer: Any, context: int) -> PackedBlocks:
    """`PackedBlocks`, whose errors begin with what the text is, such as "data='book.txt'"."""
    try:
        return PackedBlocks(documents, tokenizer, context)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
