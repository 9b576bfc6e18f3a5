"""`pi-attention inspect`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from pi_attention.cli.runs import OURS, known_context, model_folder, need_ours
from pi_attention.describe import by_layers, in_words, is_dense
from pi_attention.heads import pattern_for
from pi_attention.paths import need_folder
from pi_attention.pattern import PiPattern
from pi_attention.receptive_field import ReceptiveField, joint_coverage, key_density, keys_read, receptive_field
from pi_attention.stack import Kind, check_used, stacked
from pi_attention.training.config import fields_of_pattern
from pi_attention.units import counted, in_flops


@dataclass
class Inspect:
    """Describe the pattern of a run, or of flags: words, figures, a picture."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of a run or a saved model, whose patterns are described. The flags of a pattern are then left out."""
    window: int = 32
    """Keys of the ring-local band, the token itself counted."""
    period: tuple[int, ...] | None = None
    """Distance between skip keys: one for all heads, or one per head. None: heads that share the distance, of one
    period (4, 3 or 2, the first that divides the heads, else their number) and different phases."""
    skips: int | None = 112
    """Skip keys of a query; None is every multiple back to the start."""
    sinks: int = 0
    """First tokens that every query sees."""
    phase: tuple[int, ...] | None = None
    """Tokens that skips stand off multiples of the period, one for all heads or one per head. None: 0 where a period is
    given; where none is, each head's own."""
    causal: bool = True
    """Only keys at or before the query."""
    context: int | None = None
    """Tokens of the sequence that costs are computed for; by default those that a run was trained for, or 8,192."""
    heads: int = 8
    """Query heads."""
    kv_heads: int | None = None
    """Key/value heads; as many as heads by default."""
    head_dim: int = 64
    """Features of a head."""
    layers: int | None = None
    """Layers of the model, for what they see together; as many as layer_patterns names by default."""
    layer_patterns: tuple[Kind, ...] = ("pi",)
    """What each layer attends to, repeated over the layers: pi (the pattern above), local (its window alone), all-skips
    (its window and every skip back to the start), or dense (everything)."""
    out: Path | None = None
    """Folder of the pictures; the run's folder, or the current one, by default."""
    html: bool = False
    """Also write the interactive explorer, explorer.html, set to these layers."""
    empirical: bool = False
    """Measure what the run's network depends on, by the Jacobian of its last position (needs a run of
    `pi-attention train`)."""
    tokens: int = 512
    """Context of that measurement, in tokens; its cost grows with it."""

    def execute(self, console: Console) -> int:
        """Run the command; the exit code."""
        from pi_attention import plots
        from pi_attention.explorer import write_explorer

        self._refuse_flags_of_a_pattern()
        if self.empirical and self.run is None:
            raise ValueError("empirical=True needs a run to measure: pi-attention inspect RUN --empirical.")
        if self.tokens != Inspect.tokens and not self.empirical:
            raise ValueError(f"tokens={self.tokens} is of a measurement: add --empirical, or leave it out.")
        need_folder("out" if self.out or self.run is None else "run", self.out or self.run or Path())
        stack, context, heads, kv_heads, head_dim = self._describe()
        if context < 1 or not stack:
            raise ValueError(f"context={context} and layers={len(stack)} must be at least 1.")
        if self.html and not stack[0].causal:
            raise ValueError("html=True shows causal patterns: leave it out.")
        layers = by_layers(stack)
        for pattern, title in layers.items():
            console.print(self._table(pattern, title, context, heads, kv_heads, head_dim))
        if len(layers) > 1:
            console.print(_cost_of_the_stack(stack, context, heads, kv_heads, head_dim))
        field = receptive_field(stack, context)
        console.print(_of_the_stack(field, alike=len(layers) == 1))
        pictures = {
            "pattern.png": plots.stack_picture(stack, context),
            "receptive_field.png": plots.coverage_picture(field),
            "density.png": plots.density_picture({title: pattern for pattern, title in layers.items()}, context),
        }
        if self.empirical:
            pictures |= self._measured(console)
        out = self.out or self.run or Path()
        for name, picture in pictures.items():
            plots.save(picture, out / name)
        written = list(pictures)
        if self.html:
            written.append("explorer.html")
            write_explorer(out / written[-1], stack, heads=heads, context=context)
        console.print(f"written: {', '.join(str(out / name) for name in written)}", soft_wrap=True)
        return 0

    def _refuse_flags_of_a_pattern(self) -> None:
        """Raise ValueError where the pattern of a run is to be described, and flags name another."""
        if self.run is None:
            return
        for field in fields(self):
            value = getattr(self, field.name)
            own = field.name not in ("run", "out", "html", "empirical", "tokens", "context")
            if own and value != field.default:
                raise ValueError(
                    f"{field.name}={value!r} is given beside run={str(self.run)!r}, which has its own: leave one of "
                    "them out."
                )

    def _measured(self, console: Console) -> dict[str, Any]:
        """The Jacobian and the attention by lag of the run's network, on random tokens."""
        import torch

        from pi_attention import plots
        from pi_attention.models import PiForCausalLM
        from pi_attention.tasks.influence import influence

        assert self.run is not None
        model = PiForCausalLM.from_pretrained(model_folder(self.run), use_safetensors=True)
        ids = torch.randint(0, model.config.vocab_size, (1, self.tokens), generator=torch.Generator().manual_seed(0))
        found = influence(model, ids)
        table = Table(
            "last layers needed", "positions", "median norm of the gradient", title="Jacobian of the last position"
        )
        for number, positions, norm in found.by_hops():
            table.add_row(str(number), f"{positions:,}", f"{norm:.3g}")
        console.print(table)
        verdict = "exactly on" if found.agrees else f"against the prediction at {found.wrong} positions of"
        console.print(f"non-zero {verdict} the {found.field.covered():,} of {self.tokens:,} positions predicted")
        model.set_attn_implementation("eager")
        with torch.no_grad():
            maps = model(ids, output_attentions=True, use_cache=False).attentions
        return {
            "influence.png": plots.influence_picture(found),
            "attention_by_lag.png": plots.mass_by_lag_picture(list(maps)),
        }

    def _describe(self) -> tuple[list[PiPattern], int, int, int, int]:
        """Pattern of every layer, context, heads, key heads and head dim."""
        if self.run is None:
            pattern = pattern_for(self.heads, fields_of_pattern(self))
            pattern.check_heads(self.heads)
            kinds, layers = self.layer_patterns, len(self.layer_patterns) if self.layers is None else self.layers
            check_used(self, layers)
            kv_heads = self.kv_heads or self.heads
            context = 8192 if self.context is None else self.context
            return stacked(kinds, pattern, layers), context, self.heads, kv_heads, self.head_dim
        from transformers import AutoConfig

        import pi_attention.convert  # noqa: F401  registers our configurations

        need_ours(self.run, OURS)
        config = AutoConfig.from_pretrained(model_folder(self.run), trust_remote_code=False)
        if self.empirical and config.model_type != "pi":
            raise ValueError(
                f"empirical=True measures models of `pi-attention train`, and run={str(self.run)!r} holds a converted "
                "one: leave it out."
            )
        text, heads = config.get_text_config(), config.get_text_config().num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        context = known_context(config) if self.context is None else self.context
        return config.patterns(), context, heads, getattr(text, "num_key_value_heads", None) or heads, head_dim

    @staticmethod
    def _table(pattern: PiPattern, title: str, context: int, heads: int, kv_heads: int, head_dim: int) -> Table:
        from pi_attention.accounting import attention_flops, cache_bytes, cache_tokens, dense_flops, visible_pairs

        flops = attention_flops(pattern, context, heads=heads, head_dim=head_dim)
        dense = dense_flops(context, heads=heads, head_dim=head_dim, causal=pattern.causal)
        of_heads = [visible_pairs(pattern, context, head=head) for head in range(len(pattern.periods))]
        local, skip = (sum(pairs) / len(of_heads) for pairs in zip(*of_heads, strict=True))
        table = Table(title=title, show_header=False)
        table.add_row("a query sees", in_words(pattern, context))
        mean = f"mean over {counted(context, 'token')}"
        table.add_row("keys per query", f"{local / context:.1f} local and {skip / context:.1f} skip, {mean}")
        reach = None if is_dense(pattern, context) else pattern.reach
        table.add_row("reach of a layer", "everything before" if reach is None else f"{counted(reach, 'token')} back")
        for name, words in _of_one_layer(pattern, context):
            table.add_row(name, words)
        table.add_row("attention FLOPs", f"{in_flops(flops)} forward a layer, {flops / dense:.2%} of dense")
        if pattern.skips is None:
            table.add_row(
                "all skips, beside dense", f"{flops / dense:.1%} of the products; they grow with the context squared"
            )
        if pattern.causal:
            size = cache_bytes(pattern, context, kv_heads=kv_heads, head_dim=head_dim)
            table.add_row(
                "decoding cache",
                f"{counted(cache_tokens(pattern, context), 'token')}, {size / 2**20:.2f} MiB a layer in 16 bits",
            )
            read = keys_read(pattern, context, heads=heads, kv_heads=kv_heads) / kv_heads
            table.add_row(
                "a decoded token reads",
                f"{read:,.0f} keys a key head, {read / context:.2%} of the {context:,} up to it",
            )
        return table


def _of_one_layer(pattern: PiPattern, context: int) -> list[tuple[str, str]]:
    """Which lags the heads see together, and how many keys a lag has."""
    covered, density = joint_coverage(pattern, context), key_density(pattern, context)
    holes = covered.holes()
    count = f"{counted(len(holes), 'hole') if holes else 'no holes'} up to {covered.reach:,}"
    first = f", the first at lags {holes[0][0]:,} to {holes[0][1]:,}" if holes else ""
    seen = [(start, end, f"{float(share):.3g}") for start, end, share in density if share]
    beyond = len(density) - len(seen)
    octaves = ", ".join(f"{share} at {start:,} to {end:,}" for start, end, share in seen)
    return [
        ("heads together see", f"every lag below {covered.stretch:,} in one layer; {count}{first}"),
        ("keys a lag", f"{octaves}{', none beyond' if beyond else ''} (mean of heads)"),
    ]


def _cost_of_the_stack(stack: list[PiPattern], context: int, heads: int, kv_heads: int, head_dim: int) -> Table:
    """What all layers cost together, beside as many dense ones."""
    from pi_attention.accounting import stack_cost

    cost = stack_cost(stack, context, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    table = Table(title=f"all {counted(len(stack), 'layer')}", show_header=False)
    share = cost["flops"] / cost["dense flops"]
    table.add_row("attention FLOPs", f"{in_flops(cost['flops'])} forward, {share:.2%} of dense")
    if stack[0].causal:
        held, whole = cost["cache bytes"], cost["dense cache bytes"]
        table.add_row("decoding cache", f"{held / 2**20:,.2f} MiB in 16 bits, {held / whole:.2%} of dense")
        read = sum(keys_read(pattern, context, heads=heads, kv_heads=kv_heads) for pattern in stack) / kv_heads
        share = read / len(stack) / context
        table.add_row("a decoded token reads", f"{read:,.0f} keys a key head, {share:.2%} of dense")
    return table


def _of_the_stack(field: ReceptiveField, alike: bool) -> Table:
    holes, hops = field.holes(), field.layers_to_cover()
    which = "last" if field.query == field.context - 1 else "middle"
    title = f"the {which} token of {field.context:,} through {counted(field.layers, 'layer')}"
    table = Table(title=title, show_header=False)
    table.add_row("sees", f"{counted(field.covered(), 'position')} ({field.covered() / field.context:.2%})")
    table.add_row("reaches", f"{counted(field.reach(), 'token')} back")
    table.add_row(
        "first hole", f"lags {holes[0][0]:,} to {holes[0][1]:,}, of {counted(len(holes), 'hole')}" if holes else "none"
    )
    through = "more layers than these" if hops is None else f"{'' if alike else 'the last '}{counted(hops, 'layer')}"
    table.add_row("sees everything through", through)
    return table
