"""`pi-attention bill`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from pi_attention.bill import MODELS, WAYS, bill, fewest_ranks
from pi_attention.stack import Kind, check_used, stacked
from pi_attention.training.config import pattern_of

LABELS = {
    "state": "parameters and optimizer",
    "gradients": "gradients",
    "gathered": "gathered parameters, in bf16",
    "activations": "hidden states between layers",
    "layer": "activations of one layer",
    "logits": "logits",
    "keys": "keys of other GPUs, the layer with most",
    "received": "received, the layer with most",
    "flops": "operations",
    "bytes": "memory at the peak of the step",
    "fewest GPUs": "fewest GPUs of {} GiB",
}
"""What the rows of the table are called."""


@dataclass
class Bill:
    """What each GPU holds and receives when many GPUs share one sequence."""

    context: int = 131072
    """Tokens of the sequence."""
    gpus: int = 8
    """GPUs that share the sequence (cp of `train --parallel`)."""
    dp: int = 1
    """Groups of GPUs with a sequence each; weights and optimizer are sharded over all of them."""
    tp: int = 1
    """GPUs that share the heads and features of each layer."""
    zero: Literal[1, 2, 3] = 3
    """What is sharded over the groups: 3 is all, 2 leaves the weights whole, 1 the sums of gradients, too."""
    model: Literal["1b", "8b", "70b"] = "8b"
    """Shape of the model."""
    window: int = 256
    """Keys of the ring-local band, the token itself counted."""
    period: tuple[int, ...] = (256,)
    """Distance between skip keys: one for all heads, or one per head."""
    skips: int | None = 16
    """Skip keys of a query; None is every multiple back to the start."""
    sinks: int = 0
    """First tokens that every query sees."""
    phase: tuple[int, ...] = (0,)
    """Tokens by which skip keys stand off multiples of the period: one for all heads, or one per head."""
    layer_patterns: tuple[Kind, ...] = ("pi",)
    """What each layer attends to, repeated over the layers: pi (the pattern above), local (its window alone), all-skips
    (its window and every skip back to the start), or dense (everything)."""
    loss_slice: int | None = None
    """Tokens whose logits exist together (`train --loss-slice`); by default all tokens of a GPU."""
    memory: int = 80
    """GiB of a GPU."""
    json: bool = False
    """Print JSON alone."""

    def execute(self, console: Console) -> int:
        """Run the command; the exit code."""
        if not 1 <= self.gpus <= self.context:
            raise ValueError(f"gpus must be from 1 to context={self.context}, got {self.gpus}.")
        if self.memory < 1:
            raise ValueError(f"memory must be at least 1 GiB, got {self.memory}.")
        pattern_of(self).check_heads(MODELS[self.model].num_attention_heads)
        check_used(self, MODELS[self.model].num_hidden_layers)
        figures = self.figures()
        if self.json:
            console.print_json(json.dumps(figures))
        else:
            console.print(self._table(figures))
        return 0

    def figures(self) -> dict[str, dict[str, Any]]:
        """What a rank holds and receives for a training step, by the way that keys reach it."""
        sizes, memory = MODELS[self.model], self.memory << 30
        patterns = stacked(self.layer_patterns, pattern_of(self), sizes.num_hidden_layers)
        layout = {"dp": self.dp, "tp": self.tp, "zero": int(self.zero)}
        found: dict[str, dict[str, Any]] = {}
        for way in WAYS:
            made = bill(sizes, patterns, self.context, self.gpus, way, self.loss_slice, **layout)
            fewest = fewest_ranks(sizes, patterns, self.context, memory, way, self.loss_slice, **layout)
            parts = asdict(made)
            peaks = {f"peak of {part}": size for part, size in parts.pop("peaks").items()}
            found[way] = parts | peaks | {"bytes": made.bytes, "fewest GPUs": fewest and fewest * self.dp * self.tp}
        return found

    def _table(self, bills: dict[str, dict[str, Any]]) -> Table:
        sizes = MODELS[self.model]
        shape = (
            f"the {self.model} model ({sizes.num_hidden_layers} layers, {sizes.num_attention_heads} heads, "
            f"{sizes.num_key_value_heads} key heads)"
        )
        ranks = self.dp * self.gpus * self.tp
        table = Table(
            title=f"What one of {ranks} GPUs holds in a training step, {self.context:,} tokens a sequence: {shape}",
            caption="halo: a GPU receives the keys that its pattern sees; all-gather: all keys; dense ring: all keys "
            "in turn, for dense attention. The parts are not all there at once, so the peak is less than their sum. "
            "Layers are recomputed (`train --gradient-checkpointing`), and the allocator takes more than tensors do.",
        )
        for name in ("", *bills):
            table.add_column(name, justify="left" if not name else "right")
        for name in next(iter(bills.values())):
            values = [found[name] for found in bills.values()]
            if name.startswith("fewest"):
                none = f"none up to {min(4096, self.context) * self.dp * self.tp:,}"
                cells = [none if value is None else f"{value:,}" for value in values]
            elif name == "flops":
                cells = [f"{value / 1e12:,.0f} TFLOP" for value in values]
            else:
                cells = [f"{value / 2**30:,.2f} GiB" for value in values]
            table.add_row(LABELS.get(name, name).format(self.memory), *cells)
        return table
