"""`pi-attention convert`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from pi_attention.cli.pretrained import (
    HELD_OUT,
    load_decoder,
    load_tokenizer_of,
    need_decoder,
    need_positions,
    training_and_held_out,
)
from pi_attention.paths import need_folder, status_of

if TYPE_CHECKING:
    from pi_attention.cli.conversion import Conversion
    from pi_attention.data.packing import PackedBlocks
    from pi_attention.pattern import PiPattern


@dataclass
class Convert:
    """Give a pretrained decoder π-Attention, measure, fine-tune and save it."""

    model: str = ""
    """Folder or hub name of the pretrained model."""
    out: Path = Path("runs/converted")
    """Folder for the converted model and its tokenizer."""
    window: int = 1020
    """Keys of the ring-local band, the token itself included. With skips, 204 was measured."""
    period: tuple[int, ...] | None = None
    """Distance of the skips: one for all heads, or one per head. None: heads that share the distance, of one period (4,
    3 or 2, the first that divides the heads, else their number) and different phases."""
    skips: int = 0
    """Skips a token; 0 is a sliding window alone. After training in long texts, 816 beside a window of 204 were better
    than a window, and windows with chosen dense layers better than both. Without training, skips were worse."""
    sinks: int = 4
    """First tokens that stay visible; pretrained models need some."""
    phase: tuple[int, ...] | None = None
    """Tokens by which skips stand off multiples of the period: one for all heads, or one per head. None: 0 where a
    period is given; where none is, each head's own."""
    layers: tuple[int, ...] | None = None
    """Indices of the layers to convert, from 0 on; None converts all that attend to everything."""
    dense_layers: int = 0
    """How many layers stay dense: those that lower the loss most, each tried as the only dense one. The loss is of
    --eval-blocks blocks of the text to fine-tune on, no longer than the pretrained context, once for each layer."""
    extend_to: int | None = None
    """Tokens that the model is to see, beyond the context of its pretraining. In layers that see so far, the rotary
    embedding turns slower. Train the model on in such texts: --context as long, and --finetune-steps."""
    gate: bool = False
    """Add a learned fusion gate to each converted layer."""
    finetune_steps: int = 0
    """Steps of fine-tuning, after which weights are saved in fp32; 0 saves the pretrained ones as they are."""
    part: Literal["gates", "lora", "all"] = "all"
    """What is fine-tuned: the gates alone (needs --gate), low-rank adapters (merged at the end) and the gates, if any,
    or all weights."""
    learning_rate: float | None = None
    """Peak learning rate of the fine-tune; 3e-3 for gates, 2e-4 for adapters, 2e-5 for all weights when None."""
    data: str = "shakespeare"
    """Text to fine-tune and evaluate on: see `pi-attention train`."""
    text_field: str = "text"
    """The field of .jsonl, .csv and .parquet files and data sets that holds the text."""
    context: int = 2048
    """Tokens of a block."""
    eval_blocks: int = 4
    """Blocks on which perplexity is measured; 0 measures nothing."""
    seed: int = 0
    """Seed of the fine-tune: of gates, adapters and the order of the blocks."""
    save_every: int = 100
    """Steps of fine-tuning between two checkpoints in OUT/finetune; Ctrl-C saves one as well."""
    resume: bool = False
    """Go on with the fine-tune that was interrupted in OUT, with its settings, to the same result."""

    def execute(self, console: Console) -> int:
        """Run the command; the exit code."""
        if not self.resume:
            self._refuse()
            return self._conversion(console).run()
        from pi_attention.training.unfinished import kept

        settings, found = kept(self.unfinished, self.in_place(), ("out", "resume", "data"))
        settings.out = self.out
        if self.data != Convert.data:  # it may have moved
            settings.data = self.data
        return settings._conversion(console).go_on(found)

    @property
    def unfinished(self) -> Path:
        """Folder of a fine-tune that has not ended."""
        return self.out / "finetune"

    def in_place(self) -> Convert:
        """The same settings with paths that serve in every folder."""
        model, data = (str(Path(x).resolve()) if x and Path(x).exists() else x for x in (self.model, self.data))
        return replace(self, model=model, data=data)

    def _conversion(self, console: Console) -> Conversion:
        """What the settings ask for: model and text are loaded, and what cannot be converted is refused before."""
        from pi_attention.accelerator import best_device
        from pi_attention.cli.conversion import Conversion
        from pi_attention.convert.config import free_layers, need_layers, patterns_with
        from pi_attention.convert.conversion import need_convertible
        from pi_attention.convert.extension import check_extension
        from pi_attention.stack import DENSE

        config = need_decoder(self.model)
        layers = need_layers(self.layers, config)
        heads = getattr(config, "num_attention_heads", 1)  # convert refuses a model without any
        pattern = self._pattern(heads)
        pattern.check_heads(heads)
        check_extension(self.extend_to, config, patterns_with(config, DENSE if self.dense_layers else pattern, layers))
        known = getattr(config, "max_position_embeddings", self.context)
        free = len(free_layers(config))
        self._refuse_beside(free, known)
        tokenizer = load_tokenizer_of(self.model)
        training, validation = self._blocks(tokenizer)
        model = load_decoder(self.model)
        need_positions(model, self.context)
        need_convertible(model, pattern, self.gate)
        return Conversion(
            asked=self,
            pattern=pattern,
            layers=layers,
            model=model.to(best_device()),
            tokenizer=tokenizer,
            training=training,
            validation=validation,
            known=known,
            free=free,
            dtype=config.dtype,
            console=console,
        )

    def _refuse(self) -> None:
        """Raise an error for what is wrong whatever the model is, before it is read."""
        if not self.model:
            raise ValueError("model is empty: give the folder or the hub name of a pretrained model.")
        need_folder("out", self.out)
        if status_of("out", self.out / "config.json") is not None:
            raise FileExistsError(f"out={str(self.out)!r} holds a model already: choose another folder, or delete it.")
        if status_of("out", self.unfinished / "settings.yaml") is not None:
            raise FileExistsError(
                f"out={str(self.out)!r} holds a fine-tune that was interrupted: add --resume, or delete "
                f"{self.unfinished}."
            )
        self._pattern(1)
        for name in ("period", "phase", "gate"):
            if not self.skips and getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} is of skips, and skips=0 is none: add --skips.")
        if self.part == "gates" and not self.gate:
            raise ValueError("part='gates', but gate=False leaves none: add --gate, or train --part lora or all.")
        for name in ("learning_rate", "part", "seed", "save_every"):
            if not self.finetune_steps and getattr(self, name) != getattr(Convert, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is of a fine-tune, and finetune_steps=0 is none: leave it out."
                )
        if self.dense_layers:
            self._refuse_choice()
        if self.extend_to is not None and self.context > self.extend_to:
            raise ValueError(
                f"context={self.context} is more than extend_to={self.extend_to}: extend the model as far, or give "
                "shorter blocks."
            )
        if self.finetune_steps and self.part == "lora":
            from pi_attention.training.finetune import need_peft

            need_peft()

    def _refuse_choice(self) -> None:
        """Raise an error where the layers that stay dense cannot be chosen."""
        if self.layers is not None:
            raise ValueError(
                f"dense_layers={self.dense_layers} chooses the layers to convert, and layers={self.layers} names them: "
                "leave one of them out."
            )
        if not self.eval_blocks:
            raise ValueError(
                f"dense_layers={self.dense_layers} are chosen on eval_blocks=0 blocks of text: give more blocks, or "
                "name --layers."
            )
        if self.window + self.sinks >= self.context:
            raise ValueError(
                f"dense_layers={self.dense_layers} are chosen by what a window misses, and window={self.window} with "
                f"sinks={self.sinks} covers context={self.context}: give a longer context, or name --layers."
            )

    def _refuse_beside(self, free: int, known: int) -> None:
        """Raise an error for what is wrong beside a model of so many free layers that knows so many tokens."""
        if self.dense_layers >= max(1, free):
            raise ValueError(f"dense_layers={self.dense_layers} leaves none of {free} layers to convert: give fewer.")
        if self.dense_layers and self.window + self.sinks >= known:
            raise ValueError(
                f"dense_layers={self.dense_layers} are chosen by what a window misses in the pretrained context of "
                f"{known}, and window={self.window} with sinks={self.sinks} covers it: give a smaller window, or name "
                "--layers."
            )
        if self.extend_to is None and self.dense_layers and self.context > known:
            warnings.warn(
                f"context={self.context} is beyond the pretrained context of {known}, and dense layers see it whole: "
                "with --extend-to their rotary embedding turns slower.",
                stacklevel=2,
            )
        if self.extend_to is not None and self.context <= known:
            warnings.warn(
                f"context={self.context} is within the pretrained context of {known}, so that nothing beyond it is "
                f"measured or trained: give --context up to extend_to={self.extend_to}.",
                stacklevel=2,
            )

    def _pattern(self, heads: int) -> PiPattern:
        """That of a model of so many query heads, which may not fit them yet."""
        from pi_attention.heads import pattern_for
        from pi_attention.training.config import fields_of_pattern

        return pattern_for(heads, fields_of_pattern(self))

    def _blocks(self, tokenizer: Any) -> list[PackedBlocks]:
        """Blocks of the text to train on, and of the tenth of it that is held out."""
        from pi_attention.data.corpus import load_documents
        from pi_attention.data.packing import blocks_named

        documents = load_documents(self.data, text_field=self.text_field)
        parts = zip(("training", "held-out"), training_and_held_out(documents), strict=True)
        text = f"part of data={self.data!r}, {100 * HELD_OUT:.0f} % held out"
        return [blocks_named(f"the {name} {text}", part, tokenizer, self.context) for name, part in parts]
