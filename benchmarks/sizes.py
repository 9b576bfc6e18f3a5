"""The configuration of a model of given sizes, for measurements of its training step."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pi_attention.accounting import Sizes
from pi_attention.models import PiConfig
from pi_attention.pattern import PiPattern


def config_of(sizes: Sizes, pattern: PiPattern, **options: Any) -> PiConfig:
    """A model of these sizes and this pattern; its gate, if it has one, has the default width."""
    shape = {name: size for name, size in asdict(sizes).items() if not name.startswith("gate_")}
    return PiConfig(**shape, **pattern.to_dict(), **{"gate": sizes.gate_width > 0} | options)
