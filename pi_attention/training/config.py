"""Every setting of a training run, each with its sentence; the command line and the YAML file are made from these."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml

from pi_attention.files import write_text
from pi_attention.heads import pattern_for
from pi_attention.paths import need_file
from pi_attention.pattern import PiPattern
from pi_attention.stack import Kind, check_used, stacked
from pi_attention.training.values import as_kind


@dataclass
class DataSettings:
    """Where the text comes from."""

    data: str = "shakespeare"
    """"shakespeare" (bundled), a .txt, .jsonl, .csv or .parquet file, a folder of .txt, or OWNER/NAME on the hub."""
    text_field: str = "text"
    """The field of .jsonl, .csv and .parquet files and data sets that holds the text."""
    tokenizer: str = "bytes"
    """"bytes", "bpe:2048" (byte pairs, trained on the text), or the name or folder of any Hugging Face tokenizer."""
    validation_fraction: float = 0.05
    """Share of the text held out for validation: whole documents if there are at least ten."""
    context: int = 2048
    """Tokens of a block. Documents are packed into blocks and do not see one another."""


@dataclass
class ModelSettings:
    """The shape of the model and its pattern."""

    hidden_size: int = 256
    """Features of a token."""
    layers: int = 4
    """Number of blocks."""
    heads: int = 4
    """Query heads."""
    kv_heads: int | None = None
    """Key/value heads for grouped-query attention; as many as heads by default."""
    window: int = 16
    """Keys of the ring-local band, the token itself counted."""
    period: tuple[int, ...] | None = None
    """Distance between skip keys: one for all heads, or one per head. None: heads that share the distance, of one
    period (4, 3 or 2, the first that divides the heads, else their number) and different phases."""
    skips: int | None = 64
    """Skip keys of a query. 0 leaves the window alone; None takes every multiple back to the start."""
    sinks: int = 0
    """First tokens of a document that every query sees."""
    phase: tuple[int, ...] | None = None
    """Tokens that skips stand off multiples of the period, one for all heads or one per head. None: 0 where a period is
    given; where none is, each head's own."""
    layer_patterns: tuple[Kind, ...] = ("pi",)
    """What each layer attends to, repeated over the layers: pi (the pattern above), local (its window alone), all-skips
    (its window and every skip back to the start), or dense (everything)."""
    gate: bool = False
    """Learn a fusion gate per token and head, as in the paper. Without it, one softmax covers both bands."""
    fusion: Literal["gate", "mass"] = "gate"
    """How the gate fuses the bands: the paper's sigmoid, or one that starts from a joint softmax. Needs --gate."""
    gate_features: int | None = None
    """Features of the hidden state that the gate sees; all by default. Needs --gate."""
    qk_norm: bool = True
    """Normalise each head's query and key."""
    tie_word_embeddings: bool = True
    """Share the input embedding with the output layer."""

    def pattern(self) -> PiPattern:
        """The pattern of the "pi" layers."""
        return pattern_for(self.heads, fields_of_pattern(self))


@dataclass
class OptimizerSettings:
    """How the model is trained."""

    steps: int = 300
    """Optimiser steps."""
    batch_size: int = 1
    """Blocks that a device computes together."""
    gradient_accumulation: int = 1
    """Batches of each device in a step. A resumed run keeps the blocks of its step, whatever the layout."""
    learning_rate: float = 3e-3
    """Peak learning rate: linear warm-up, then cosine decay."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    loss_slice: int | None = None
    """Tokens whose logits exist together, computed again in the backward pass; all by default. For long contexts."""
    compile: bool = False
    """Compile the model with torch.compile."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic: bf16 where the device is a GPU that has it, else fp32."""


@dataclass
class RunSettings:
    """The run's folder and rhythm."""

    out: Path = Path("runs/pi")
    """Folder of the run: checkpoints, configuration, metrics, pictures, sample."""
    resume: bool = False
    """Go on from the folder's last checkpoint, with the folder's settings. Others are refused, but for those of the
    machine: parallel, zero, patience, report-to, push-to-hub, and how a step is divided into batches."""
    checkpoint: int | None = None
    """With resume: go on from the checkpoint of this step, where later ones are damaged. Those are put aside."""
    seed: int = 0
    """Seed of weights, order of the blocks and sample."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    eval_every: int = 100
    """Steps between two validations."""
    eval_blocks: int = 16
    """Blocks of a validation during training."""
    save_every: int = 100
    """Steps between two checkpoints; Ctrl-C saves one as well."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Where figures go beside metrics.jsonl: tensorboard, wandb, trackio, mlflow, or none."""
    push_to_hub: str = ""
    """Repository of the Hugging Face hub, user/name, that takes the finished model; made private if it is new."""
    parallel: str = ""
    """Under torchrun, "dp=2,tp=1,cp=4": ranks with other sequences (dp, by default), heads (tp), parts of one (cp)."""
    patience: int = 600
    """Under torchrun: seconds that a rank waits for the others before the run ends with an error."""
    zero: Literal[1, 2, 3] = 3
    """Under torchrun: 1 shards the optimizer's state, 2 gradients too, 3 parameters too."""


@dataclass
class TrainConfig:
    """Train a language model on text, and write a run folder."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        self.named: frozenset[str] = frozenset()
        """Settings that somebody gave for certain, such as "optimizer.batch_size", if only a default's value."""

    def gives(self, part: str, name: str) -> bool:
        """Whether somebody gave this setting: it is named, or no default."""
        value, default = (getattr(getattr(settings, part), name) for settings in (self, TrainConfig()))
        return f"{part}.{name}" in self.named or value != default

    def check(self) -> None:
        """Raise ValueError for settings that cannot work, before any work is done."""
        positive = {
            "context": self.data.context,
            "steps": self.optimizer.steps,
            "batch_size": self.optimizer.batch_size,
            "gradient_accumulation": self.optimizer.gradient_accumulation,
            "log_every": self.run.log_every,
            "eval_every": self.run.eval_every,
            "eval_blocks": self.run.eval_blocks,
            "save_every": self.run.save_every,
            "keep_checkpoints": self.run.keep_checkpoints,
            "patience": self.run.patience,
            "loss_slice": self.optimizer.loss_slice,
        }
        for name, value in positive.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        pairs_of(self.data.tokenizer)
        if self.optimizer.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.optimizer.learning_rate}.")
        model = self.model
        if model.heads < 1 or model.hidden_size % model.heads:
            raise ValueError(f"heads={model.heads} must divide hidden_size={model.hidden_size}.")
        if model.kv_heads is not None and (model.kv_heads < 1 or model.heads % model.kv_heads):
            raise ValueError(f"kv_heads={model.kv_heads} must divide heads={model.heads}.")
        if model.hidden_size // model.heads % 2:
            raise ValueError(
                f"hidden_size={model.hidden_size} over heads={model.heads} must be even: rotary embeddings turn pairs. "
                "Change one."
            )
        pattern = model.pattern()
        pattern.check_heads(model.heads)
        stacked(model.layer_patterns, pattern, model.layers)

    def check_unused(self) -> None:
        """Raise ValueError for settings of a gate, of skips or of a window that no layer has: they change nothing."""
        model, default = self.model, ModelSettings()
        check_used(model, model.layers)
        for name in ("fusion", "gate_features"):
            if not model.gate and getattr(model, name) != getattr(default, name):
                value = getattr(model, name)
                raise ValueError(f"{name}={value!r} is of a gate, and gate=False: add --gate, or leave it out.")


def pairs_of(name: str) -> int | None:
    """The vocabulary of a tokenizer "bpe:VOCABULARY"; None of any other name.

    Raises:
        ValueError: the vocabulary is no whole number from 512 to 65,536.
    """
    kind, colon, size = name.partition(":")
    if kind != "bpe" or not colon:
        return None
    if not (size.isascii() and size.isdecimal() and 512 <= int(size) <= 65536):
        raise ValueError(f"tokenizer={name!r}: give a vocabulary from 512 to 65536, such as bpe:2048.")
    return int(size)


def fields_of_pattern(settings: object) -> dict[str, Any]:
    """The fields of a pattern that a settings object has; a period or phase of one entry is that of all heads."""
    names = [field.name for field in dataclasses.fields(PiPattern) if hasattr(settings, field.name)]
    values = {name: getattr(settings, name) for name in names}
    alone = {name: x[0] for name, x in values.items() if isinstance(x, tuple) and len(x) == 1}
    return values | alone


def pattern_of(settings: object) -> PiPattern:
    """The pattern that the fields of a settings object spell.

    Raises:
        TypeError, ValueError: a field is of the wrong kind or contradicts another.
    """
    return PiPattern.from_dict(fields_of_pattern(settings))


Settings = TypeVar("Settings")


def to_plain(settings: object) -> dict[str, Any]:
    """A settings dataclass as plain values for YAML."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(settings))  # type: ignore[call-overload]


def from_plain(
    kind: type[Settings], values: dict[str, Any], where: str = "", default: Settings | None = None
) -> Settings:
    """Settings from plain values; what is left out is as in `default`, that of the kind when None.

    Raises:
        ValueError: a name is unknown, and the message lists the known ones; or a value is of another kind.
    """
    made, kinds = kind() if default is None else copy.deepcopy(default), get_type_hints(kind)
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"unknown setting {where + str(name)!r}: use one of {sorted(kinds)}.")
        part = getattr(made, name)
        if dataclasses.is_dataclass(part):
            if not isinstance(value, dict):
                raise ValueError(f"{where + name} must be a mapping of settings, got {value!r}.")
            value = from_plain(type(part), value, f"{where}{name}.", part)
        else:
            value = as_kind(where + name, value, kinds[name])
        setattr(made, name, value)
    return made


class EachKeyOnce(yaml.SafeLoader):
    """YAML whose mappings name each key once, where the last would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As of `SafeLoader`; ValueError for a key that stands twice."""
        keys = [key.value for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise ValueError(f"the key {twice[0]!r} stands twice, line {node.start_mark.line + 1} and below")
        return super().construct_mapping(node, deep)


def load_yaml(kind: type[Settings], path: Path, default: Settings | None = None) -> Settings:
    """Settings from a YAML file, UTF-8 whatever the locale; see `from_plain` for what it leaves out.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it is no YAML, or a setting is unknown or of another kind.
    """
    need_file("config", path, "a YAML file of settings")
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), EachKeyOnce) or {}
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not is a ValueError
        raise ValueError(f"config={str(path)!r} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config={str(path)!r} must hold a mapping of settings, got {type(values).__name__}.")
    return from_plain(kind, values, default=default)


def save_yaml(settings: object, path: Path) -> None:
    """Write settings to a YAML file, which is whole or absent."""
    write_text(path, yaml.safe_dump(to_plain(settings), sort_keys=False, allow_unicode=True))
