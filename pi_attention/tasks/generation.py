"""Text from a model, streamed, with what it cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer, set_seed

from pi_attention.data.tokenizers import beginning
from pi_attention.models import PiCache, PiStaticCache, save_prompt_cache
from pi_attention.models.cache_argument import CACHE
from pi_attention.models.prompt_cache import load_named
from pi_attention.paths import need_new_file, status_of

CHUNK = 4096
"""Tokens of a prompt that are read at once before it is saved."""


@dataclass
class Generation:
    """A generated text and its cost."""

    text: str
    """Prompt and continuation."""
    new_tokens: int
    """Tokens generated."""
    seconds: float
    """Time, the prompt's forward pass included."""
    cache_bytes: int
    """Memory of keys and values at the end."""


@torch.no_grad()
def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 400,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    stream: bool = False,
    prompt_cache: Path | None = None,
) -> Generation:
    """Continue `prompt`, which begins as the tokenizer begins a text; temperature 0 is greedy.

    Args:
        prompt_cache: a file of `save_prompt_cache`, with which the prompt begins; written where there is none.

    Raises:
        ValueError: the prompt is empty, or a setting is out of range, or the file is not of this model or this prompt.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}: 0 is greedy.")
    if top_k < 0:
        raise ValueError(f"top_k must not be negative, got {top_k}: 0 samples among all tokens.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt={prompt!r} is not UTF-8: give text of the terminal's encoding.") from error
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise ValueError("prompt is empty: give at least one character.")
    input_ids = torch.tensor([[*beginning(tokenizer), *tokens]], device=model.device)
    cache = None if prompt_cache is None else _read_before(model, input_ids, prompt_cache)
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    begun = time.perf_counter()
    out = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        **({} if cache is None else {CACHE: cache}),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        return_dict_in_generate=True,
        **sampling,
    )
    seconds = time.perf_counter() - begun
    return Generation(
        text=tokenizer.decode(out.sequences[0], skip_special_tokens=True),
        new_tokens=out.sequences.shape[1] - input_ids.shape[1],
        seconds=seconds,
        cache_bytes=getattr(out, CACHE).nbytes,
    )


def _read_before(model: Any, input_ids: Tensor, path: Path) -> PiCache | PiStaticCache:
    """The cache of a prompt [1, T] without its last tokens: of the file, which is written where there is none."""
    _need_one_growing_cache(model)
    if status_of("prompt_cache", path) is not None:
        saved = load_named("prompt_cache", path, model)
        known = saved.input_ids.shape[1]
        if known >= input_ids.shape[1] or not torch.equal(input_ids[:, :known], saved.input_ids):
            raise ValueError(
                f"prompt_cache={str(path)!r} is of another text: let the prompt begin with the {known} tokens in it "
                "and go on behind them, or name a new file."
            )
        return saved.cache
    need_new_file("prompt_cache", path)
    first = input_ids[:, :-1]  # the last token is what generation begins with
    if not first.shape[1]:
        raise ValueError("prompt has one token, and a prompt cache saves those before the last: give a longer one.")
    begun = model.generate(
        first,
        attention_mask=torch.ones_like(first),
        max_new_tokens=1,
        do_sample=False,
        prefill_chunk_size=CHUNK,
        return_dict_in_generate=True,
    )
    cache = getattr(begun, CACHE)
    save_prompt_cache(cache, path, model, first)
    return cache


def _need_one_growing_cache(model: Any) -> None:
    """Raise ValueError where the model's generation config asks for what a cache of one read prompt cannot serve."""
    config = getattr(model, "generation_config", None)
    for name, plain in (("cache_implementation", None), ("num_beams", 1), ("num_return_sequences", 1)):
        value = getattr(config, name, None)
        if value not in (None, plain):
            raise ValueError(
                f"prompt_cache cannot serve {name}={value!r} of the model's generation config: set it to {plain} in "
                "generation_config.json, or leave prompt_cache out."
            )
