"""What the paged cache takes: bytes of a request, and blocks for all that run at once."""

from __future__ import annotations

from typing import Any

from pi_attention.models.batching import paged_config
from pi_attention.models.paged import page_bytes, sector_bytes

PAGE = 16
"""Tokens of a page: what a request holds more than it needs is less than this in each layer."""


def request_bytes(model: Any, tokens: int) -> int:
    """Bytes of the pages that a text of so many tokens holds: all of it in a dense layer, sinks and ring in others."""
    config = paged_config(model)
    kept = {"full_attention": tokens, "sliding_attention": min(tokens, config.sliding_window or tokens)}
    pages = sum(-(-kept[kind] // PAGE) for kind in config.layer_types)
    return pages * page_bytes(config, model.dtype, PAGE)


def blocks(model: Any, tokens: int, requests: int) -> int:
    """`num_blocks` of transformers with which so many texts of that length fit at once."""
    config = paged_config(model)
    block = config.num_hidden_layers * page_bytes(config, model.dtype, PAGE)
    spare = len(set(config.layer_types)) * sector_bytes(config, model.dtype, PAGE)  # one begun for each kind of layers
    return -(-(requests * request_bytes(model, tokens) + spare) // block)
