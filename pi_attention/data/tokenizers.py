"""Tokenizers: any of Hugging Face's, plain bytes, or byte pairs trained on a text."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

END = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token ids 0 to 255 are the bytes of the UTF-8 text, 256 is END, the end of a document.

    Text never becomes the token 256, not even "<|endoftext|>": text and its bytes correspond one to one.
    """
    vocabulary = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _of_text(tokenizer)


def byte_pair_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte pairs trained on texts: `vocabulary` tokens, the bytes and the end of a document among them.

    The same texts give the same tokens. Text and tokens correspond one to one, and no text becomes the end.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return _of_text(tokenizer)


def _of_text(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """As a tokenizer of transformers, to which no text is a control token."""
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def load_tokenizer(name: str) -> Any:
    """`bytes`, or the name or folder of a Hugging Face tokenizer.

    Raises:
        ValueError: there is none of that name, or it has no end-of-document token.
    """
    if name == "bytes":
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f'tokenizer={name!r} cannot be loaded: give "bytes", a local folder, or a name on the hub. {error}'
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer={name!r} has no eos_token, which separates documents: set one and save it.")
    return tokenizer


def beginning(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a text: the beginning-of-sequence token of Llama and Gemma, nothing of many others.

    What it puts behind one is left out: a text that goes on has not ended.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return list(whole[: next(starts, 0)])
