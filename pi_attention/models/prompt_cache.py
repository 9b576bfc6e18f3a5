"""A prompt that a model has read, as a file: a later process goes on from there as if it had read it itself."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pi_attention.cache.held import Held
from pi_attention.files import replacing
from pi_attention.models.caching import BoundedCache, PiCache, PiStaticCache
from pi_attention.models.fingerprint import difference, fingerprint
from pi_attention.models.inputs import check_cache, check_inputs
from pi_attention.paths import need_file, need_new_file, shown
from pi_attention.pattern import need_int

FORMAT = "pi-attention prompt cache 1"


@dataclass
class PromptCache:
    """A prompt and what a model remembers of it.

    Example::

        prompt = load_prompt_cache("manual.safetensors", model)
        ids = torch.cat([prompt.input_ids, question], dim=1)
        model.generate(ids, past_key_values=prompt.cache, max_new_tokens=50)
    """

    cache: PiCache | PiStaticCache
    """Of the tokens that the model has seen; `generate` changes it, so load it again for another continuation."""
    input_ids: Tensor
    """[B, T] int64; of a generated text the last token, which the model has not seen, is among them."""
    attention_mask: Tensor | None
    """[B, T] int64, 0 for padding; None without padding."""


def save_prompt_cache(
    cache: Any,
    path: str | Path,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> None:
    """Write a cache, and the tokens in it, to a safetensors file, which appears whole or not at all.

    The file holds the keys and values that later tokens can see; what `activate_past_recording` kept is left out.

    Args:
        cache: a `PiCache` or `PiStaticCache`, as `generate(…, return_dict_in_generate=True)` returns it.
        path: of the file; one that is there is replaced.
        model: a causal model of ours, which filled the cache.
        input_ids: [B, T] int64, all tokens that the cache has seen, and perhaps more behind them.
        attention_mask: [B, T], 0 for padding: the one that the cache was filled with.

    Raises:
        TypeError: the cache is not one of ours, the model is none that generates, or the tokens are no tensor.
        ValueError: it is empty or of another model's patterns, the tokens are not those in it, or the path cannot be
            written.
        NotImplementedError: the weights of the model are spread over devices.
    """
    path = Path(path)
    need_new_file("path", path)
    if not isinstance(cache, PiCache | PiStaticCache):
        raise TypeError(f"cache is a {type(cache).__name__}: pass a PiCache, as model.new_cache() makes it.")
    _need_causal_model(model)
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids must be a Tensor [B, T], got {type(input_ids).__name__}: pass all tokens in the cache."
        )
    check_cache(cache, model.config.patterns())
    check_inputs(input_ids, None, attention_mask, None)
    layers = [layer.storage.held() for layer in cache.layers]
    rows, length = layers[0].starts.shape[0], layers[0].length
    if len(input_ids) != rows or input_ids.shape[1] < length:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} must be all the tokens of the cache, [{rows}, {length}] or longer."
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} must be of the shape of input_ids {tuple(input_ids.shape)}."
        )
    tensors = {"input_ids": input_ids.long()}
    if attention_mask is not None:
        tensors["attention_mask"] = (attention_mask != 0).long()
    for number, layer in enumerate(layers):
        tensors |= {f"layers.{number}.states": layer.states, f"layers.{number}.starts": layer.starts}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"length": length, "model": fingerprint(model), "tensors": _contents(tensors)}
    text = json.dumps(header)
    with replacing(path) as partial:
        save_file(tensors, partial, {"format": FORMAT, "header": text, "checksum": str(zlib.crc32(text.encode()))})


def load_prompt_cache(path: str | Path, model: Any, *, max_length: int | None = None) -> PromptCache:
    """What `save_prompt_cache` wrote, on the devices of a model's layers.

    Args:
        path: of the file.
        model: the one that filled the cache, loaded again: the same configuration, weights and dtype.
        max_length: of a `PiStaticCache` to fill, whichever was saved; None fills a `PiCache`.

    Raises:
        TypeError: the model is none that generates, or max_length no int.
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or no prompt cache, or of another model; the message names what differs. Or
            max_length leaves no room.
    """
    return load_named("path", Path(path), model, max_length)


def load_named(argument: str, path: Path, model: Any, max_length: int | None = None) -> PromptCache:
    """`load_prompt_cache` for a caller whose own argument names the file: errors are of that."""
    _need_causal_model(model)
    if max_length is not None:  # before the model takes it for the size of later caches
        need_int("max_length", max_length, 1, "tokens that will come at most")
    need_file(argument, path, "a file that save_prompt_cache wrote")
    header, tensors = _read(argument, path)
    differs = difference(header["model"], fingerprint(model))
    if differs is not None:
        raise ValueError(
            f"{argument}={shown(path)} is the cache of another model, with {differs}: load the model that it was "
            "saved with, or read the prompt again."
        )
    patterns = model.config.patterns()
    rows = len(tensors["input_ids"])
    cache = model.new_cache() if max_length is None else model._prepare_static_cache("static", rows, max_length)
    _fill(cache, header["length"], tensors, _devices(model, len(patterns)))
    mask = tensors.get("attention_mask")
    return PromptCache(cache, tensors["input_ids"].to(model.device), None if mask is None else mask.to(model.device))


def _need_causal_model(model: Any) -> None:
    """Raise TypeError for what is no causal model of ours: it alone makes caches and goes on from them."""
    if not hasattr(model, "new_cache"):  # wrappers such as those of PEFT pass it through
        raise TypeError(
            f"model is a {type(model).__name__}: pass the causal model, a PiForCausalLM or what convert returns, "
            "and not a part of it."
        )


def _fill(cache: BoundedCache, length: int, tensors: dict[str, Tensor], devices: list[torch.device]) -> None:
    for number, (layer, device) in enumerate(zip(cache.layers, devices, strict=True)):
        states, starts = (tensors[f"layers.{number}.{name}"] for name in ("states", "starts"))
        layer.storage.hold(Held(states.to(device), starts.to(device), length))


def _devices(model: Any, layers: int) -> list[torch.device]:
    """Where each layer of a model computes."""
    found = [model.device] * layers
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        weight = next(module.parameters(), None)
        if number is not None and weight is not None and not weight.is_meta:
            found[number] = weight.device
    return found


def _contents(tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    """Shape, dtype and CRC-32 of each tensor, as JSON has them."""
    return {
        name: [list(x.shape), str(x.dtype), zlib.crc32(x.reshape(-1).view(torch.uint8).numpy().data)]
        for name, x in tensors.items()
    }


def _read(argument: str, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, each as it was written.

    Raises:
        ValueError: it is no prompt cache, or damaged.
    """
    remedy = "read the prompt again, and save it."
    try:
        with safe_open(path, framework="pt") as file:
            noted = file.metadata() or {}
            if not noted.get("format", "").startswith(FORMAT.rstrip("1234567890")):
                raise ValueError(
                    f"{argument}={shown(path)} is no prompt cache: give a file that save_prompt_cache wrote."
                )
            if noted["format"] != FORMAT:
                raise ValueError(f"{argument}={shown(path)} is a {noted['format']}, and this version reads {FORMAT}.")
            text = noted.get("header", "")
            if noted.get("checksum") != str(zlib.crc32(text.encode())):
                raise ValueError(f"{argument}={shown(path)} is damaged, its header has changed: {remedy}")
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 no dict
    except SafetensorError as error:
        raise ValueError(f"{argument}={shown(path)} is damaged, or no prompt cache ({error}): {remedy}") from error
    header = json.loads(text)
    found = _contents(tensors)
    changed = [name for name in {**header["tensors"], **found} if header["tensors"].get(name) != found.get(name)]
    if changed:
        raise ValueError(f"{argument}={shown(path)} is damaged, the bytes of {changed[0]} have changed: {remedy}")
    return header, tensors
