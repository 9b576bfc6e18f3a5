"""The work of `pi-attention convert`: measure, choose dense layers, convert, fine-tune, save."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import set_seed

from pi_attention.cli.pretrained import HELD_OUT
from pi_attention.cli.terminal import INTERRUPTED
from pi_attention.convert import convert, dense_gains, neediest
from pi_attention.data.packing import PackedBlocks
from pi_attention.files import replacing_folder
from pi_attention.models.card import write_card
from pi_attention.pattern import PiPattern
from pi_attention.recommended import EVERY
from pi_attention.stack import DENSE
from pi_attention.tasks.language_modelling import evaluate
from pi_attention.training.card import save_picture
from pi_attention.training.checkpoints import step_of
from pi_attention.training.finetune import LEARNING_RATES, finetune
from pi_attention.training.text import need_same_text
from pi_attention.training.unfinished import keep, whole_checkpoint

MUCH = 0.05
"""A perplexity so far above dense attention's, as a share of it, has a remedy named."""


@dataclass
class Conversion:
    """A pretrained model and a text, loaded and checked, and what has been found of them.

    Args:
        asked: the settings, a `Convert`.
        pattern: of the converted layers.
        layers: to convert; None for all that attend to everything.
        model: pretrained, on its device.
        tokenizer: of the model.
        training: blocks to fine-tune on.
        validation: blocks that are held out.
        known: tokens of the pretrained context.
        free: how many layers attend to everything.
        dtype: of the pretrained weights, if it is known.
        console: for lines.
        facts: for the card, by their names.
    """

    asked: Any
    pattern: PiPattern
    layers: list[int] | None
    model: Any
    tokenizer: Any
    training: PackedBlocks
    validation: PackedBlocks
    known: int
    free: int
    dtype: torch.dtype | None
    console: Console
    facts: dict[str, str] = field(default_factory=dict)

    def run(self) -> int:
        """Measure, choose, convert and save; the exit code."""
        dense = self._measure()
        converted = self._converted()
        self._name_dense_layers(self._report("converted, untrained", converted) / dense - 1)
        if self.asked.finetune_steps:
            keep(self.asked.unfinished, self.asked.in_place(), self._found(), **self._parts())
        return self._finish(converted)

    def go_on(self, found: dict[str, Any]) -> int:
        """Go on with a fine-tune that was interrupted; the exit code.

        Args:
            found: layers and facts, which are not measured again.

        Raises:
            ValueError: the text has changed.
        """
        need_same_text(self.asked.unfinished, self.asked.data, **self._parts())
        self.layers, self.facts = found["layers"], found["facts"]
        return self._finish(self._converted())

    def _found(self) -> dict[str, Any]:
        return {"layers": self.layers, "facts": self.facts}

    def _parts(self) -> dict[str, PackedBlocks]:
        return {"training": self.training, "validation": self.validation}

    def _converted(self) -> Any:
        set_seed(self.asked.seed)  # of gates and adapters
        return convert(
            self.model, self.pattern, gate=self.asked.gate, layers=self.layers, extend_to=self.asked.extend_to
        )

    def _finish(self, converted: Any) -> int:
        """Fine-tune if that was asked for, and save; the exit code."""
        asked = self.asked
        if asked.finetune_steps:
            done = self._finetune(converted)
            if done < asked.finetune_steps:
                again = f"pi-attention convert --out {asked.out} --resume"
                self.console.print(f"Interrupted at step {done}, saved. Go on: {again}", soft_wrap=True)
                return INTERRUPTED
            self._report(f"after {asked.finetune_steps} steps of {asked.part}", converted)
        else:
            converted.config.text_config.dtype = self.dtype or converted.dtype
            converted.to(converted.config.text_config.dtype)  # the weights are still those that were loaded
        self._save(converted)
        generate = f"pi-attention generate {asked.out}"
        measure = f"pi-attention eval {asked.out} --data {asked.data} --held-out --context {asked.context}"
        self.console.print(f"Saved in {asked.out}. Next: {generate}, or {measure}", soft_wrap=True)
        return 0

    def _measure(self) -> float:
        """The model as it was, and extended; then the layers that stay dense. The perplexity of dense attention."""
        asked, dense = self.asked, math.nan
        self.facts["data"] = f"{asked.data}, {100 * HELD_OUT:.0f} % held out"
        self.facts["context"] = f"{asked.context:,} tokens"
        if asked.extend_to is not None:
            self.facts["extended to"] = f"{asked.extend_to:,} tokens, from {self.known:,}"
        if asked.eval_blocks:
            for further in dict.fromkeys((None, asked.extend_to)):
                what = "dense" if further is None else "dense, extended"
                dense = self._report(what, convert(self.model, DENSE, extend_to=further))  # every key of a block
        if asked.dense_layers:
            self.layers, self.facts["dense layers"] = self._chosen()
        return dense

    def _report(self, what: str, model: Any) -> float:
        """Print and note the perplexity of a model on the held-out text."""
        if not self.asked.eval_blocks:
            return math.nan
        result = evaluate(model, self.validation, limit=self.asked.eval_blocks)
        found = f"{result.perplexity:.2f} a token ({result.tokens:,} tokens"
        self.facts[f"perplexity, {what}"] = f"{found})"
        self.console.print(f"{what}: perplexity {found}, held out)")
        return result.perplexity

    def _name_dense_layers(self, above: float) -> None:
        """Where perplexity is so far above dense attention's, as a share of it, and no layer stays dense."""
        if above > MUCH and self.layers is None:
            self.console.print(
                f"That is {above:.0%} above dense attention. A few dense layers may give most of it back: "
                f"--dense-layers {max(1, self.free // EVERY)}",
                soft_wrap=True,
            )

    def _chosen(self) -> tuple[list[int], str]:
        """The layers to convert, and in words those that stay dense."""
        asked, console, text = self.asked, self.console, self.training.cut(self.known)
        console.print(f"trying each of {self.free} layers as the only one of them that stays dense")
        begun, losses = time.monotonic(), list[float]()

        def loss(tried: Any) -> float:
            losses.append(evaluate(tried, text, limit=asked.eval_blocks).loss)
            if len(losses) == 1:  # of none of them
                left = self.free * (time.monotonic() - begun)
                console.print(
                    f"none of them dense: perplexity {math.exp(losses[0]):.2f} a token of the text to train on; the "
                    f"others take about {f'{left / 60:.0f} min' if left > 90 else f'{left:.0f} s'}",
                    soft_wrap=True,
                )
            return losses[-1]

        gains = dense_gains(self.model, self.pattern, loss)
        if max(gains.values()) <= 0:
            raise ValueError(
                f"dense_layers={asked.dense_layers}: no dense layer lowers the loss of blocks of {text.context} "
                f"tokens, of the pretrained context of {self.known} at most. Give more --eval-blocks or a longer "
                "--context, name --layers, or leave it out."
            )
        dense = neediest(gains, asked.dense_layers)
        said = ", ".join(f"{layer} ({gains[layer]:.4f})" for layer in dense)
        console.print(f"dense layers, and the nats a token that each alone gives back: {said}", soft_wrap=True)
        return [layer for layer in gains if layer not in dense], ", ".join(map(str, dense))

    def _finetune(self, converted: Any) -> int:
        """Train from the last checkpoint on, if there is one; the step after which it ended."""
        asked, checkpoint = self.asked, whole_checkpoint(self.asked.unfinished)
        if checkpoint is not None:
            self.console.print(f"going on after step {step_of(checkpoint)} of {asked.finetune_steps}")
        return finetune(
            converted,
            self.training,
            steps=asked.finetune_steps,
            part=asked.part,
            learning_rate=asked.learning_rate or LEARNING_RATES[asked.part],
            out=asked.unfinished,
            seed=asked.seed,
            save_every=asked.save_every,
            checkpoint=checkpoint,
            tell=self.console.print,
        )

    def _save(self, converted: Any) -> None:
        """Model, tokenizer, card and picture, all or nothing; then what a fine-tune kept is not needed."""
        asked = self.asked
        with replacing_folder(asked.out, "config.json") as partial:
            converted.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            picture = save_picture(partial, converted.config.patterns(), asked.context)
            base_model = "" if Path(asked.model).exists() else asked.model
            write_card(partial, converted.config, self.facts, base_model=base_model, picture=picture)
        shutil.rmtree(asked.unfinished, ignore_errors=True)
