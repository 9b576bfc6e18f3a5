"""Text from a model, streamed, with what it cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from pi_attention.models.cache_argument import CACHE


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
) -> Generation:
    """Continue `prompt`; temperature 0 is greedy.

    Raises:
        ValueError: the prompt is empty, or a setting is out of range.
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
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("prompt is empty: give at least one character.")
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    begun = time.perf_counter()
    out = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        return_dict_in_generate=True,
        **sampling,
    )
    seconds = time.perf_counter() - begun
    return Generation(
        text=tokenizer.decode(out.sequences[0], skip_special_tokens=True),
        new_tokens=out.sequences.shape[1] - inputs["input_ids"].shape[1],
        seconds=seconds,
        cache_bytes=getattr(out, CACHE).nbytes,
    )
