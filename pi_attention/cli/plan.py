"""`pi-attention plan`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from rich.console import Console
from rich.table import Table

from pi_attention.accounting import (
    attention_bytes,
    attention_flops,
    cache_bytes,
    cache_tokens,
    dense_flops,
    roofline_seconds,
    stack_cost,
)
from pi_attention.cli.goals import table_of_goals
from pi_attention.devices import DEVICES
from pi_attention.files import write_text
from pi_attention.paths import need_new_file
from pi_attention.planner import Plan as Found
from pi_attention.planner import longest_stretch, plan
from pi_attention.receptive_field import receptive_field
from pi_attention.recommended import BEST_PERIOD, EVERY, MEASURED, SHARED, Goal, recommended
from pi_attention.training.config import ModelSettings
from pi_attention.units import counted, in_flops


@dataclass
class Plan:
    """Choose a pattern, for a context or for a goal, and say what it costs."""

    context: int = 131072
    """Tokens that the last layer must see."""
    layers: int = 24
    """Layers of the model."""
    heads: int = 16
    """Query heads."""
    kv_heads: int | None = None
    """Key/value heads; as many as heads by default."""
    head_dim: int = 128
    """Features of a head."""
    goal: Goal | None = None
    """Take the form that language models measured best for this, and compare what those of all goals cost: quality;
    few-products, for long prompts; bounded-cache, where no layer may keep everything; least, for the lowest cost."""
    budget: int | None = None
    """Most keys of a query. The pattern covers the context in the fewest layers. 256 unless --hops is given. With
    --goal: those of a query in the layers that do not see everything."""
    every: int = EVERY
    """With --goal quality or few-products: one layer in so many sees everything. 6 was measured; with quality,
    12 too."""
    hops: int | None = None
    """Layers through which every token is seen. The pattern has the fewest keys for that."""
    head_schedule: bool = False
    """Give heads different periods, each a multiple of the one before: far fewer keys, over more layers."""
    coordinated: bool = False
    """Give heads one period and a phase each, for the longest stretch of lags seen in one layer."""
    least_window: int = 16
    """Fewest neighbours that every head of a coordinated plan keeps."""
    sinks: int = 0
    """First tokens that every query sees. They are not part of the budget."""
    device: str | None = None
    """Also estimate the time on this device, which was measured: h200."""
    json: bool = False
    """Print JSON alone."""
    out: Path | None = None
    """Write the pattern and these sizes to this YAML file, for `pi-attention train --config FILE`."""

    def execute(self, console: Console) -> int:
        """Run the command; the exit code."""
        if self.device is not None and self.device not in DEVICES:
            raise ValueError(f"device={self.device!r} was not measured: use one of {sorted(DEVICES)}, or leave it out.")
        for name in ("context", "layers", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}.")
        if self.least_window != Plan.least_window and not self.coordinated:
            raise ValueError(f"least_window={self.least_window} is of coordinated plans: add --coordinated.")
        if self.sinks >= self.context:
            raise ValueError(f"sinks={self.sinks} must be fewer than the tokens of context={self.context}.")
        if self.out is not None:
            need_new_file("out", self.out)
            if self.context < 2:
                raise ValueError("context=1 has no token to predict, so that no run can train: give more, or no --out.")
            if self.head_dim % 2:
                raise ValueError(
                    f"head_dim={self.head_dim} must be even in the settings of a training run, whose rotary embeddings "
                    "turn pairs: change it, or leave out --out."
                )
        if self.every != EVERY and self.goal not in MEASURED:
            raise ValueError(f"every={self.every} is of --goal quality or few-products: leave it out.")
        if self.goal is not None:
            return self._for_goal(self.goal, console)
        found = self.found()
        figures = self.figures(found)
        words = {name: value for name, value in figures["pattern"].items() if hasattr(ModelSettings, name)}
        if self.out is not None:
            self._write(self.out, words)
        if self.json:
            console.print_json(json.dumps(figures))
            return 0
        table = Table(title=f"{counted(self.context, 'token')}, {counted(self.layers, 'layer')}", show_header=False)
        for name, value in self._rows(found, figures):
            table.add_row(name, value)
        console.print(table)
        self._say(words, self._measured(), console)
        return 0

    def _for_goal(self, goal: Goal, console: Console) -> int:
        """Run the command for a goal of language models."""
        for name in ("hops", "head_schedule", "coordinated", "device"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is of plans without a goal: leave out one of them.")
        keys = 256 if self.budget is None else self.budget
        if keys < 2:
            raise ValueError(f"budget={keys} must be at least 2: a window and a skip are two keys.")
        goals = [name for name in get_args(Goal) if name == goal or self.heads > 1 or name not in SHARED]
        forms = {
            name: recommended(name, keys=keys, heads=self.heads, layers=self.layers, sinks=self.sinks, every=self.every)
            for name in goals
        }
        shape = {"heads": self.heads, "kv_heads": self.kv_heads or self.heads, "head_dim": self.head_dim}
        costs = {name: stack_cost(form.patterns(self.layers), self.context, **shape) for name, form in forms.items()}
        if self.out is not None:
            self._write(self.out, forms[goal].settings)
        if self.json:
            console.print_json(json.dumps({"goal": goal, "settings": forms[goal].settings, "costs": costs}))
            return 0
        title = f"{counted(self.context, 'token')}, {counted(self.layers, 'layer')}: one forward pass"
        console.print(table_of_goals(title, costs, goal))
        said = f"{forms[goal].measured}. {forms[goal].scale}: docs/results.md."
        self._say(forms[goal].settings, said, console)
        return 0

    def _say(self, settings: dict[str, Any], measured: str, console: Console) -> None:
        """The model in Python, what was measured of it, and where its settings were written."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        console.print(f"PiConfig({arguments})", highlight=False, soft_wrap=True)
        console.print(measured, highlight=False, soft_wrap=True)
        if self.out is not None:
            console.print(
                f"written: {self.out}, for a model of {counted(self.layers, 'layer')} and "
                f"{self.heads * self.head_dim:,} features ({counted(self.heads, 'head')} of {self.head_dim}). "
                f"Next: pi-attention train --config {self.out}",
                soft_wrap=True,
            )

    def _measured(self) -> str:
        """What plans of this kind were measured to be good for."""
        if self.coordinated:
            said = "Language models did as well without a gate, by one softmax over both bands"
            if self.heads != BEST_PERIOD:
                said += f". With four heads, period {BEST_PERIOD} was better than 2 and 8. --goal bounded-cache takes "
                said += f"{BEST_PERIOD} where it divides the heads"
        elif self.head_schedule:
            said = "Such plans find a key anywhere in the context. In language models a window with twice the keys was "
            said += "better"
        else:
            said = "One period finds far keys less often than --head-schedule. In language models it was never better "
            said += "than a window; --goal takes forms that were"
        return f"{said} (docs/results.md)."

    def _write(self, path: Path, pattern: dict[str, Any]) -> None:
        """The settings of a training run."""
        sizes = {"layers": self.layers, "heads": self.heads, "kv_heads": self.kv_heads or self.heads}
        model = sizes | {"hidden_size": self.heads * self.head_dim} | pattern
        settings = {"data": {"context": self.context}, "model": model}
        write_text(path, yaml.safe_dump(settings, sort_keys=False))

    def found(self) -> Found:
        """The plan for what was asked."""
        budget = 256 if self.budget is None and self.hops is None else self.budget
        if not self.coordinated:
            periods = self.heads if self.head_schedule else 1
            return plan(self.context, self.layers, heads=periods, budget=budget, hops=self.hops, sinks=self.sinks)
        for name in ("hops", "head_schedule"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} asks for another plan than coordinated=True: leave one of them out."
                )
        assert budget is not None
        limits = {"least_window": self.least_window, "context": self.context, "sinks": self.sinks}
        return longest_stretch(budget, self.heads, **limits)

    def figures(self, found: Found) -> dict[str, Any]:
        """Everything that is printed, as JSON."""
        pattern, heads, kv_heads = found.pattern, self.heads, self.kv_heads or self.heads
        field = receptive_field([pattern] * self.layers, self.context)
        hops = field.layers_to_cover() if self.coordinated else found.hops
        after = receptive_field([pattern] * (hops or self.layers), self.context)
        flops = attention_flops(pattern, self.context, heads=heads, head_dim=self.head_dim)
        dense = dense_flops(self.context, heads=heads, head_dim=self.head_dim)
        size = cache_bytes(pattern, self.context, kv_heads=kv_heads, head_dim=self.head_dim)
        figures: dict[str, Any] = {
            "pattern": pattern.to_dict(),
            "keys": found.keys,
            "hops": hops,
            "reach of a layer": pattern.reach,
            "covered in these hops": after.covered(),
            "covered by the model": field.covered(),
            "context": self.context,
            "attention flops a layer": flops,
            "of dense": flops / dense,
            "cache tokens": cache_tokens(pattern, self.context),
            "cache bytes a layer": size,
            "dense cache bytes a layer": 2 * self.context * kv_heads * self.head_dim * 2,
        }
        if pattern.phase:
            figures["pattern"]["phase"] = list(pattern.phases)
        if self.coordinated:
            figures["stretch of a layer"] = found.context
        if self.device is not None:
            figures["seconds a layer"] = self._seconds(flops, kv_heads)
        return figures

    def _seconds(self, flops: int, kv_heads: int) -> dict[str, float]:
        """Expected time of the operator in one layer: the floor times what the benchmark measured over it."""
        device = DEVICES[str(self.device)]
        rates = {"flops_per_second": device.flops_per_second, "bytes_per_second": device.bytes_per_second}
        moved = attention_bytes(self.context, heads=self.heads, kv_heads=kv_heads, head_dim=self.head_dim)
        forward = roofline_seconds(flops, moved["forward"], **rates)
        training = roofline_seconds(3.5 * flops, sum(moved.values()), **rates)
        return {
            "forward": forward * device.forward_over_floor,
            "forward + backward": training * device.training_over_floor,
        }

    def _rows(self, found: Found, figures: dict[str, Any]) -> list[tuple[str, str]]:
        pattern = found.pattern
        periods, phases = (", ".join(map(str, dict.fromkeys(x))) for x in (pattern.periods, pattern.phases))
        words = f"window {pattern.window}, period {periods}, skips {pattern.skips}, sinks {pattern.sinks}"
        through = "more than" if figures["hops"] is None else f"{figures['hops']} of"
        rows = [
            ("pattern", f"{words}, phase {phases}"),
            ("keys of a query", f"{found.keys:,} (dense: up to {self.context:,})"),
            ("reach of a layer", f"{counted(figures['reach of a layer'], 'token')} back"),
            ("sees the whole context through", f"{through} {counted(self.layers, 'layer')}"),
            ("attention FLOPs", f"{in_flops(figures['attention flops a layer'])} a layer forward, "
                                f"{figures['of dense']:.2%} of dense"),
            ("decoding cache", f"{figures['cache bytes a layer'] / 2**20:,.1f} MiB a layer, "
                               f"dense {figures['dense cache bytes a layer'] / 2**20:,.1f} MiB, "
                               f"in 16 bits with {counted(self.kv_heads or self.heads, 'key head')}"),
        ]  # fmt: skip
        if "stretch of a layer" in figures:
            rows.insert(3, ("lags without a hole", f"{found.context:,} in one layer, by the heads together"))
        for kind, seconds in figures.get("seconds a layer", {}).items():
            rows.append((f"expected {kind}", f"{1e3 * seconds:,.2f} ms a layer, {DEVICES[str(self.device)].name}"))
        return rows
