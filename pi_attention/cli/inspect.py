"""`pi-attention inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from pi_attention.cli.runs import model_folder
from pi_attention.pattern import PiPattern


@dataclass
class Inspect:
    """Describe a pattern in words, figures and a picture: that of a run, or one given by flags."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of a run or a saved model; its patterns are described instead of the flags below."""
    window: int = 128
    """Keys of the ring-local band, the token itself counted."""
    period: tuple[int, ...] = (128,)
    """Distance between skip keys: one for all heads, or one per head."""
    skips: int | None = 16
    """Skip keys of a query; None is every multiple back to the start."""
    sinks: int = 0
    """First tokens that every query sees."""
    causal: bool = True
    """Only keys at or before the query."""
    context: int = 8192
    """Tokens of the sequence that costs are computed for."""
    heads: int = 8
    """Query heads."""
    kv_heads: int | None = None
    """Key/value heads; as many as heads by default."""
    head_dim: int = 64
    """Features of a head."""
    out: Path | None = None
    """Where the picture goes: a file, by default pattern.png in the run's folder."""

    def execute(self, console: Console) -> int:
        """Run the command; the exit code."""
        from pi_attention import plots

        layers, context, heads, kv_heads, head_dim = self._describe()
        for pattern, numbers in layers.items():
            title = f"layers {', '.join(map(str, numbers))}" if numbers else "pattern"
            console.print(self._table(pattern, title, context, heads, kv_heads, head_dim))
        out = self.out or (Path("pattern.png") if self.run is None else self.run / "pattern.png")
        pattern = next(iter(layers))
        plots.save(plots.pattern_picture(pattern, plots.telling_length(pattern, context)), out)
        console.print(f"picture: {out}")
        return 0

    def _describe(self) -> tuple[dict[PiPattern, list[int]], int, int, int, int]:
        """Patterns with the layers that use them, context, heads, key heads and head dim."""
        if self.run is None:
            period = self.period[0] if len(self.period) == 1 else self.period
            pattern = PiPattern(self.window, period, self.skips, causal=self.causal, sinks=self.sinks)
            pattern.check_heads(self.heads)
            return {pattern: []}, self.context, self.heads, self.kv_heads or self.heads, self.head_dim
        from pi_attention.models import PiConfig

        config = PiConfig.from_pretrained(model_folder(self.run))
        layers: dict[PiPattern, list[int]] = {}
        for number, pattern in enumerate(config.patterns()):
            layers.setdefault(pattern, []).append(number)
        context = config.max_position_embeddings
        return layers, context, config.num_attention_heads, config.num_key_value_heads, config.head_dim

    @staticmethod
    def _table(pattern: PiPattern, title: str, context: int, heads: int, kv_heads: int, head_dim: int) -> Table:
        from pi_attention.accounting import attention_flops, cache_bytes, cache_tokens, dense_flops, visible_pairs

        flops = attention_flops(pattern, context, heads=heads, head_dim=head_dim)
        dense = dense_flops(context, heads=heads, head_dim=head_dim, causal=pattern.causal)
        local, skip = visible_pairs(pattern, context)
        table = Table(title=title, show_header=False)
        table.add_row("a query sees", _in_words(pattern))
        table.add_row(
            "keys per query", f"{local / context:.1f} local and {skip / context:.1f} skip, mean over {context:,} tokens"
        )
        reach = pattern.reach
        table.add_row("reach of a layer", "everything before" if reach is None else f"{reach:,} tokens back")
        table.add_row("attention FLOPs", f"{flops / 1e9:,.2f} GFLOP forward a layer, {flops / dense:.2%} of dense")
        if pattern.causal:
            size = cache_bytes(pattern, context, kv_heads=kv_heads, head_dim=head_dim)
            table.add_row(
                "decoding cache",
                f"{cache_tokens(pattern, context):,} tokens, {size / 2**20:.2f} MiB a layer in 16 bits",
            )
        return table


def _in_words(pattern: PiPattern) -> str:
    side = "the last" if pattern.causal else "on each side the nearest"
    words = [f"{side} {pattern.window:,} tokens"]
    if pattern.skips != 0:
        periods = ", ".join(map(str, pattern.periods))
        count = "every" if pattern.skips is None else f"{pattern.skips}"
        per_head = " (one period a head)" if len(pattern.periods) > 1 else ""
        words.append(f"{count} keys at multiples of {periods}{per_head} beyond them")
    if pattern.sinks:
        words.append(f"the first {pattern.sinks}")
    return ", ".join(words)
