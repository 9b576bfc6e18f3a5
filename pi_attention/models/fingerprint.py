"""Whether two models give the same keys and values: what a saved cache says of its model."""

from __future__ import annotations

import hashlib
import json
from math import gcd
from typing import Any

import torch

SAMPLES = 256
"""Entries of each weight, evenly spaced, that the digest reads, or a few more."""
WITHOUT_EFFECT = {
    *("architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "loss_slice", "problem_type"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "output_attentions"),
    *("output_hidden_states", "return_dict", "chunk_size_feed_forward", "initializer_range", "is_encoder_decoder"),
}
"""Settings of a configuration that no key or value depends on; those that begin with _ are others."""

LATER = ("extend_to",)
"""Settings of ours that caches of earlier versions lack; these were None."""
Fingerprint = dict[str, Any]


def fingerprint(model: Any) -> Fingerprint:
    """Class, patterns, dtype, configuration and a digest of the weights, as JSON has them.

    Raises:
        NotImplementedError: the weights are spread over devices as DTensors.
    """
    seen = {
        "model": type(model).__name__,
        "pattern": [pattern.to_dict() for pattern in model.config.patterns()],
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": _settings(model.config.to_dict()),
        "weights": _digest(model),
    }
    return json.loads(json.dumps(seen, default=str))


def difference(saved: Fingerprint, model: Fingerprint) -> str | None:
    """The first thing in which a saved cache's model differs from this one, in words; None for the same model."""
    for name in ("model", "pattern", "dtype"):
        if saved.get(name) != model[name]:
            return f"{name} {_shown(saved.get(name))}, and this one has {_shown(model[name])}"
    was, settings = saved.get("config", {}), model["config"]
    for name in settings:  # another version of transformers may know other settings
        if (name in was or name in LATER) and was.get(name) != settings[name]:
            return f"{name}={was.get(name)!r}, and this one has {settings[name]!r}"
    return None if saved.get("weights") == model["weights"] else "other weights"


def _shown(value: Any) -> str:
    """A pattern for each layer as the different ones, anything else as it is."""
    if not isinstance(value, list):
        return str(value)
    return f"{' '.join(dict.fromkeys(json.dumps(part) for part in value))} of {len(value)} layers"


def _settings(config: dict[str, Any], before: str = "") -> dict[str, Any]:
    """The settings that matter, those of a configuration in it under `name.`."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name.startswith("_") or name in WITHOUT_EFFECT:
            continue
        if isinstance(value, dict) and name.endswith("config"):
            found |= _settings(value, f"{before}{name}.")
        else:
            found[before + name] = value
    return found


@torch.no_grad()
def _digest(model: Any) -> str:
    """SHA-256 of the names, the shapes and samples of all weights: training changes it, loading does not."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if hasattr(weight, "device_mesh"):
            raise NotImplementedError("a prompt cache is of one device: load the model without tp_plan or FSDP.")
        digest.update(f"{name} {tuple(weight.shape)};".encode())
        if not weight.is_meta:  # accelerate moves offloaded weights in and out
            digest.update(
                weight.reshape(-1)[:: _step(weight.numel())].contiguous().view(torch.uint8).cpu().numpy().tobytes()
            )
    return digest.hexdigest()


def _step(entries: int) -> int:
    """Between two samples. It has no factor in common with a dimension, so that samples lie in columns of every kind.

    A step of 62 through rows of 32 entries would meet even columns alone.
    """
    step = max(1, entries // SAMPLES)
    while gcd(step, entries) > 1:
        step -= 1
    return step
