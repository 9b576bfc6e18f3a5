"""The model card of a saved model: its pattern in figures and a strip, how it was trained, how to load and serve it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pi_attention.describe import by_layers, in_runs, is_dense, layers_alike
from pi_attention.files import PARTIAL, write_text
from pi_attention.pattern import PiPattern

CARD = "README.md"
STRIP = 72
"""Lags of the strip, at most; with more, each letter stands for several."""


def write_card(
    folder: Path, config: Any, facts: Mapping[str, str] | None = None, *, base_model: str = "", picture: str = ""
) -> None:
    """Write the card of a model into its folder, in place of one that is there.

    Args:
        folder: of the saved model.
        config: a `PiConfig` or `PiConvertedConfig`.
        facts: how it was trained: data, tokens, losses, by their names, in the order to show them.
        base_model: name on the hub of the model that was converted.
        picture: file in the folder that shows the pattern.
    """
    write_text(
        folder / CARD, card_text(folder.resolve().name.removeprefix(PARTIAL), config, facts or {}, base_model, picture)
    )


def card_text(name: str, config: Any, facts: Mapping[str, str], base_model: str = "", picture: str = "") -> str:
    """The text of a card, Markdown with the hub's fields on top."""
    converted = config.model_type == "pi_converted"
    kind = type(getattr(config, "text_config", config)).__name__.removesuffix("Config")
    what = f"a pretrained {kind} decoder with π-Attention in its layers" if converted else "a π-Transformer"
    patterns = config.patterns()
    parts = [
        _front_matter(base_model, sparse=not all(map(is_dense, patterns))),
        f"# {name}\n\nThis is {what}: {_in_one_sentence(patterns)}.{_extension(config)}",
        "## Pattern\n\n" + _table_of_patterns(patterns),
    ]
    if picture:
        parts.append(f"![who sees what, and the lags of each head]({picture})")
    parts += _strips(patterns)
    if facts:
        rows = [f"| {_cell(fact)} | {_cell(value)} |" for fact, value in facts.items()]
        parts.append("## Training\n\n" + "\n".join(["| what | value |", "| --- | --- |", *rows]))
    bounded = not any(is_dense(pattern) or pattern.reach is None for pattern in patterns)
    parts.append(_use(name, converted, bounded))
    return "\n\n".join(parts) + "\n"


def _extension(config: Any) -> str:
    """What was done to layers that see beyond the pretrained context."""
    longer = getattr(config, "extend_to", None)
    if longer is None:
        return ""
    known = config.text_config.max_position_embeddings
    return (
        f" In layers that see beyond the pretrained context of {known:,} tokens, the rotary embedding turns slower, "
        f"for {longer:,} tokens."
    )


def _in_one_sentence(patterns: Sequence[PiPattern]) -> str:
    """What its queries attend to, by the kinds of its layers."""
    kinds = {
        "everything before them": any(map(is_dense, patterns)),
        "a window of neighbours": any(pattern.skips == 0 and not is_dense(pattern) for pattern in patterns),
        "a window of neighbours and periodic skips": any(pattern.skips != 0 for pattern in patterns),
    }
    found = [words for words, there in kinds.items() if there]
    if len(found) == 1:
        return f"its queries attend to {found[0]}"
    return f"by layer, its queries attend to {' or to '.join(found)}"


def _front_matter(base_model: str, sparse: bool) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- pi-attention"]
    lines += ["- sparse-attention", "- long-context"] if sparse else []
    if base_model:
        lines.append(f"base_model: {json.dumps(base_model, ensure_ascii=False)}")
    return "\n".join([*lines, "---"])


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _table_of_patterns(patterns: Sequence[PiPattern]) -> str:
    lines = ["| layers | window | period | phase | skips | sinks | keys a query | reach |", "| --- " * 8 + "|"]
    for pattern, alike in layers_alike(patterns).items():
        layers = in_runs(alike)
        if is_dense(pattern):
            lines.append(f"| {layers} | dense | | | | | all | everything before |")
            continue
        skips = "every" if pattern.skips is None else f"{pattern.skips:,}"
        period, phase = ("" if pattern.skips == 0 else _of_heads(x) for x in (pattern.period, pattern.phase))
        keys = "grows" if pattern.skips is None else f"{pattern.window + pattern.skips + pattern.sinks:,}"
        reach = "everything" if pattern.reach is None else f"{pattern.reach:,} tokens"
        cells = (layers, f"{pattern.window:,}", period, phase, skips, str(pattern.sinks), keys, reach)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _of_heads(value: int | tuple[int, ...]) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _strips(patterns: Sequence[PiPattern]) -> list[str]:
    """What a head sees by lag, for each pattern and each kind of head: # window, + skip, . nothing; dense layers aside.

    The strips and their legend, or nothing where all layers are dense.
    """
    lines: list[str] = []
    sparse = {pattern: words for pattern, words in by_layers(patterns).items() if not is_dense(pattern)}
    for pattern, words in sparse.items():
        most = 4 * pattern.window if pattern.reach is None else pattern.reach
        cell = -(-(most + 1) // STRIP)
        bands = pattern.skip_bands() if pattern.skips != 0 else ()
        kinds: list[Any] = list(dict.fromkeys(bands)) or [None]
        lines.append(f"{words}: lags 0 to {most:,} from left to right, {cell:,} a letter")
        for band in kinds:
            bins = (range(first, min(first + cell, most + 1)) for first in range(0, most + 1, cell))
            lines.append("".join(_letter(pattern, band, lags) for lags in bins))
    if not sparse:
        return []
    skip = ", `+` skip" if any(pattern.skips != 0 for pattern in sparse) else ""
    return ["\n".join(["```text", *lines, "```"]), f"Each line is a kind of head: `#` window{skip}, `.` nothing."]


def _letter(pattern: PiPattern, band: Any, lags: range) -> str:
    if lags.start < pattern.window:
        return "#"
    seen = () if band is None else band.within(lags.stop).lags()  # by arithmetic: a letter may stand for many lags
    return "+" if seen and seen[-1] >= lags.start else "."


def _use(name: str, converted: bool, bounded: bool) -> str:
    memory = "of bounded memory" if bounded else "that keeps every token in the layers that see everything"
    module = "pi_attention.convert" if converted else "pi_attention.models"
    return f"""## Use

```bash
pip install '.[train]'   # in a clone of the repository
pi-attention generate {name} --prompt "It was"
```

```python
import {module}  # registers the classes
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

`model.generate` decodes with a cache {memory}.
`pi-attention serve {name}` answers over HTTP. Servers that do not know π-Attention cannot load the model, or compute
dense attention in its place."""


class WithCard:
    """Before PreTrainedModel: `save_pretrained` writes a card beside the weights, unless one is there."""

    config: Any

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """As of `PreTrainedModel`, and README.md."""
        above: Any = super()
        above.save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        folder = Path(save_directory)
        if is_main_process and folder.is_dir() and not (folder / CARD).exists():
            write_card(folder, self.config)
