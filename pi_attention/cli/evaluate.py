"""`pi-attention eval`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pi_attention.cli.pretrained import (
    load_decoder,
    load_tokenizer_of,
    need_decoder,
    need_positions,
    training_and_held_out,
)
from pi_attention.files import write_text
from pi_attention.paths import need_folder

if TYPE_CHECKING:
    from pi_attention.data.packing import PackedBlocks


@dataclass
class Eval:
    """Measure perplexity, bits per byte and loss by position on a text."""

    run: Annotated[Path, tyro.conf.Positional] = Path("runs/pi")
    """Folder of a run, of a saved model, or of a pretrained model of transformers, measured as it is, in fp32."""
    data: str | None = None
    """Text to evaluate on, as for train; the run's own validation text by default."""
    held_out: bool = False
    """Only the tenth of --data that convert holds out from what it trains on."""
    text_field: str = "text"
    """The field of .jsonl, .csv and .parquet files and data sets that holds the text."""
    split: str | None = None
    """Split of a data set on the hub; "test" when None."""
    context: int | None = None
    """Tokens of a block; the model's by default."""
    batch_size: int = 1
    """Blocks at a time."""
    limit: int | None = None
    """Evaluate only the first so many blocks."""
    out: Path | None = None
    """Folder for eval.json and loss_by_position.png; the run's by default. A pretrained model needs one."""

    def execute(self, console: Console) -> int:
        """Run the command; the exit code."""
        from pi_attention import plots
        from pi_attention.tasks.language_modelling import evaluate

        need_folder("run" if self.out is None else "out", self.out or self.run)
        if self.held_out:
            self._refuse_beside_held_out()
        model, tokenizer = self._model()
        blocks = self._blocks(model, tokenizer)
        if not console.is_terminal:  # where no bar is shown
            console.print(
                f"evaluating {min(len(blocks), self.limit or len(blocks)):,} blocks of {blocks.context:,} tokens"
            )
        with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task("evaluating")
            result = evaluate(
                model,
                blocks,
                batch_size=self.batch_size,
                limit=self.limit,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        out = self.out or self.run
        found = {"model": str(self.run), "data": self.data or "validation", "held_out": self.held_out}
        found |= {"context": blocks.context} | dataclasses.asdict(result)
        write_text(out / "eval.json", json.dumps(found, indent=2))
        plots.save(plots.loss_by_position(result.position, result.loss_by_position), out / "loss_by_position.png")
        console.print(
            f"{result.tokens:,} tokens: loss {result.loss:.4f} nats, perplexity {result.perplexity:.3f} a token, "
            f"{result.bits_per_byte:.4f} bits per byte"
        )
        table = Table("position", "loss", title="Loss by position in the context")
        for position, loss in zip(result.position, result.loss_by_position, strict=True):
            table.add_row(str(position), f"{loss:.4f}")
        console.print(table)
        return 0

    def _refuse_beside_held_out(self) -> None:
        """Raise ValueError for what contradicts the text that convert holds out."""
        if self.data is None:
            raise ValueError("held_out=True is of data, and none is given: a run's own text is held out already.")
        if self.split is not None:
            raise ValueError(
                f"split={self.split!r} beside held_out=True, which is a part of what convert trains on: leave one out."
            )

    def _model(self) -> tuple[Any, Any]:
        """The model and its tokenizer; a pretrained one sees every token, as it did."""
        from pi_attention.accelerator import best_device
        from pi_attention.cli.runs import OURS, kind_of, load_run, model_folder

        if kind_of(self.run) in OURS:
            return load_run(self.run)
        folder = model_folder(self.run)
        if (self.out or self.run).resolve() in (self.run.resolve(), folder.resolve()):
            raise ValueError(
                f"run={str(self.run)!r} is a pretrained model, whose folder is left as it is: give out another one "
                "(--out)."
            )
        from pi_attention.convert import convert
        from pi_attention.stack import DENSE

        name = str(folder)
        need_decoder(name, "run")
        tokenizer = load_tokenizer_of(name, "run")
        return convert(load_decoder(name, "run"), DENSE).to(best_device()).eval(), tokenizer

    def _blocks(self, model: Any, tokenizer: Any) -> PackedBlocks:
        from pi_attention.cli.runs import known_context
        from pi_attention.data.corpus import load_documents
        from pi_attention.data.packing import blocks_named
        from pi_attention.training.config import TrainConfig, load_yaml
        from pi_attention.training.resume import SETTINGS, need_whole_settings
        from pi_attention.training.text import blocks_of, load_parts, need_same_text

        if self.data is None and not (self.run / SETTINGS).exists():
            raise ValueError("data is needed: a saved model, unlike a run, has no validation text of its own.")
        context = self.context or known_context(model.config)
        need_positions(model, context)
        if self.data is not None:
            split = "train" if self.held_out else self.split or "test"
            documents = load_documents(self.data, split=split, text_field=self.text_field)
            if not self.held_out:
                return blocks_named(f"data={self.data!r}", documents, tokenizer, context)
            held_out = training_and_held_out(documents)[1]
            return blocks_named(f"the held-out part of data={self.data!r}", held_out, tokenizer, context)
        need_whole_settings(self.run / SETTINGS)
        config = load_yaml(TrainConfig, self.run / SETTINGS)
        config.data.context = context
        blocks = blocks_of(config, "validation", load_parts(config)[1], tokenizer)
        need_same_text(self.run, config.data.data, validation=blocks)
        return blocks
