"""The text of a run: its documents, its tokenizer, its blocks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pi_attention.data.corpus import load_documents
from pi_attention.data.packing import PackedBlocks, blocks_named, hold_out
from pi_attention.data.tokenizers import byte_pair_tokenizer, load_tokenizer
from pi_attention.files import write_text
from pi_attention.training.checkpoints import publish
from pi_attention.training.config import TrainConfig, pairs_of
from pi_attention.training.resume import SETTINGS

TOKENIZER = "tokenizer"
PARTIAL_TOKENIZER = ".partial-tokenizer"
TEXT = "text.json"
"""Of a run's folder: which tokens it was trained and validated on."""


def load_parts(config: TrainConfig) -> tuple[list[str], list[str]]:
    """Training and validation documents."""
    documents = load_documents(config.data.data, text_field=config.data.text_field)
    return hold_out(documents, config.data.validation_fraction, config.run.seed)


def run_tokenizer(config: TrainConfig, documents: list[str]) -> Any:
    """By its name; or byte pairs trained on the run's documents, which a resumed run finds in its folder."""
    vocabulary, out = pairs_of(config.data.tokenizer), config.run.out
    if vocabulary is None:
        return load_tokenizer(config.data.tokenizer)
    if (out / SETTINGS).exists() and (out / TOKENIZER).is_dir():
        return load_tokenizer(str(out / TOKENIZER))
    return byte_pair_tokenizer(documents, vocabulary)


def keep_tokenizer(config: TrainConfig, tokenizer: Any) -> None:
    """Write byte pairs into the run's folder, before its settings are there; another tokenizer has a name."""
    out = config.run.out
    if pairs_of(config.data.tokenizer) is not None and not (out / SETTINGS).exists():
        tokenizer.save_pretrained(out / PARTIAL_TOKENIZER)
        publish(out / PARTIAL_TOKENIZER, out / TOKENIZER)


def blocks_of(config: TrainConfig, part: str, documents: list[str], tokenizer: Any) -> PackedBlocks:
    """The blocks of the run's "training" or "validation" documents.

    Raises:
        ValueError: the part is too short for one block.
    """
    what = f"the {part} part of data={config.data.data!r}, validation_fraction={config.data.validation_fraction}"
    return blocks_named(what, documents, tokenizer, config.data.context)


def seal_of(**parts: PackedBlocks) -> dict[str, dict[str, int | str]]:
    """How many tokens each part of a text has, and a hash of them."""
    return {
        part: {
            "tokens": len(blocks.tokens),
            "blake2b": hashlib.blake2b(blocks.tokens.data, digest_size=16).hexdigest(),
        }
        for part, blocks in parts.items()
    }


def keep_seal(config: TrainConfig, **parts: PackedBlocks) -> None:
    """Write the seal of a run that begins into its folder."""
    write_text(config.run.out / TEXT, json.dumps(seal_of(**parts), indent=1))


def need_same_text(run: Path, data: str, **parts: PackedBlocks) -> None:
    """Raise ValueError where the parts are of another text than a run began with; an earlier version kept no seal."""
    if not (run / TEXT).exists():
        return
    now = seal_of(**parts)
    try:
        then = json.loads((run / TEXT).read_text())
        changed = next((part for part in now if then[part] != now[part]), None)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{TEXT} in {str(run)!r} is damaged: delete it, if the text is still the same.") from error
    if changed is not None:
        raise ValueError(
            f"data={data!r} gives other {changed} tokens than the run in {str(run)!r} began with: "
            f"{now[changed]['tokens']:,} now, {then[changed]['tokens']:,} then. Put the old text and tokenizer back, "
            "or name another folder or text."
        )
