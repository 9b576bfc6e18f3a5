"""Configuration of the Hugging Face π-Transformer."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import fields
from inspect import signature
from typing import Any, ClassVar

from transformers import PretrainedConfig

from pi_attention.accounting import Sizes
from pi_attention.heads import coordinated_heads, pattern_for
from pi_attention.models.cache_argument import CACHE
from pi_attention.models.settings import check_settings, need_no_worked_out, warn_of_unknown
from pi_attention.nn.gate import GATE_WIDTH
from pi_attention.ops.api import Fusion
from pi_attention.ops.checks import FUSIONS, check_softcap
from pi_attention.pattern import PiPattern
from pi_attention.stack import DENSE, stacked

OF_LAYERS = {field.name for field in fields(PiPattern)} | {"layer_patterns", "num_hidden_layers", "num_attention_heads"}
"""Settings that the patterns of the layers follow from."""
DERIVED = ("sliding_window", "layer_types")
"""Settings that follow from the patterns."""


class PiConfig(PretrainedConfig):
    """A decoder of pre-norm blocks (RMSNorm, π-Attention with RoPE, SwiGLU).

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads: sizes.
        intermediate_size: feed-forward width; 8/3 of the hidden size, rounded up to a multiple of 32, when None.
        num_key_value_heads: grouped-query attention; num_attention_heads when None.
        head_dim: hidden_size / num_attention_heads when None.
        window, period, skips, sinks, phase: the pattern of the layers (see `PiPattern`); period and phase may be lists,
            one int per head. `PiConfig(**pattern.to_dict())` takes them from a pattern. Without a period, heads are
            coordinated (see `coordinated_heads`): of one period (4, 3 or 2, the first that divides the heads, else
            their number), with phases from 0 upwards. With one, the phase is 0 unless given; so it is in an entry of
            layer_patterns.
        layer_patterns: what each layer attends to, repeated over the layers: "pi" (the pattern above), "local" (its
            window alone), "all-skips" (its window and every skip back to the start), "dense", or a dict of pattern
            fields to change, e.g. {"period": 64} or {"phase": [0, 2]}.
        causal: False sees both sides, for masked language modelling and encoders; there is no cache then.
        ring: positions wrap (see `PiPattern`; causal=False only).
        gate: learn a fusion gate, as in the paper; False is one softmax over both bands, which was as good.
        fusion: of the gate, if there is one: "gate" or "mass" (see `pi_attention`).
        gate_features: the gate sees only so many features of the hidden state; None sees all.
        qk_norm: RMSNorm over each head's query and key.
        sink_logit: learn a term in the denominator of each head's softmax, as in gpt-oss; see `pi_attention`.
        softcap: scores are cap·tanh(score / cap), as in Gemma 2; None leaves them as they are.
        rope_theta: base of the rotary embedding, 10,000 when None; the one in rope_parameters.
        rope_parameters: scaling of the rotary embedding as in Llama, such as {"rope_type": "yarn", "factor": 4.0,
            "rope_theta": 10000.0}; plain when None.
        max_position_embeddings: longest context that the model was trained for.
        loss_slice: with labels, `PiForCausalLM` computes the logits of so many tokens at a time, again in the backward
            pass, and returns none of them; None computes and returns all.
        rms_norm_eps, initializer_range, tie_word_embeddings, use_cache: as in Llama.
    """

    model_type = "pi"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [CACHE]

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 512,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 32,
        period: int | list[int] | tuple[int, ...] | None = None,
        skips: int | None = 112,
        sinks: int = 0,
        phase: int | list[int] | tuple[int, ...] | None = None,
        layer_patterns: list[str | dict[str, Any]] | None = None,
        causal: bool = True,
        ring: bool = False,
        gate: bool = False,
        fusion: Fusion = "gate",
        gate_features: int | None = None,
        qk_norm: bool = False,
        sink_logit: bool = False,
        softcap: float | None = None,
        rope_theta: float | None = None,
        rope_parameters: dict[str, Any] | None = None,
        max_position_embeddings: int = 2048,
        loss_slice: int | None = None,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        rope_parameters = rope_parameters or kwargs.pop("rope_scaling", None)  # the name of older configurations
        check_settings(locals())
        need_no_worked_out(kwargs)
        warn_of_unknown(list(kwargs), PiConfig.__init__)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.intermediate_size = intermediate_size or -(-hidden_size * 8 // 3 // 32) * 32
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        given = {"window": window, "period": period, "skips": skips, "sinks": sinks, "phase": phase}
        pattern = pattern_for(num_attention_heads, given | {"causal": causal, "ring": ring})
        if skips == 0 and period is None and layer_patterns is not None:
            layer_patterns = [_coordinated(entry, num_attention_heads) for entry in layer_patterns]
        for name, setting in pattern.to_dict().items():  # checked, and as JSON has it
            setattr(self, name, setting)
        self.layer_patterns = layer_patterns
        self.gate, self.gate_features, self.qk_norm = gate, gate_features, qk_norm
        self.sink_logit, self.softcap = sink_logit, check_softcap(softcap)
        self.fusion: Fusion = fusion
        self.rope_parameters = _rotary(rope_theta, rope_parameters)
        self.max_position_embeddings, self.loss_slice = max_position_embeddings, loss_slice
        self.rms_norm_eps, self.initializer_range = rms_norm_eps, initializer_range
        self.use_cache = use_cache and causal
        self._check(head_dim)
        self.sliding_window, self.layer_types = _words_of_the_library(self.patterns())  # from here on, see __setattr__
        for derived in DERIVED:
            kwargs.pop(derived, None)
        self.base_model_tp_plan = self._tensor_parallel_plan()  # 5.17 extends it in super().__init__ when tied
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """As of `PretrainedConfig`; `sliding_window` and `layer_types` follow from the patterns of the layers."""
        super().__setattr__(name, value)
        if name in OF_LAYERS and "layer_types" in self.__dict__:
            with suppress(TypeError, ValueError):  # patterns that the next assignment may make whole
                self.sliding_window, self.layer_types = _words_of_the_library(self.patterns())

    def _check(self, head_dim: int | None) -> None:
        if head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}: "
                "change one, or give head_dim."
            )
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {FUSIONS}, got {self.fusion!r}.")
        if self.gate and not self.has_gates:
            warnings.warn(
                "gate=True weighs skips, and no layer has any, so that none gets a gate: leave it out, or give skips.",
                stacklevel=3,
            )

    def _tensor_parallel_plan(self) -> dict[str, str] | None:
        """Heads are split over the ranks; None where a pattern is spelled head by head, which no rank would split.

        None with a sink logit, too, which is spelled so.
        """
        if self.sink_logit or any(pattern.per_head for pattern in self.patterns()):
            return None
        plan = {f"layers.*.self_attn.{x}_proj": "colwise" for x in "qkv"}
        plan |= {f"layers.*.mlp.{x}_proj": "colwise" for x in ("gate", "up")}
        plan |= {"layers.*.self_attn.o_proj": "rowwise", "layers.*.mlp.down_proj": "rowwise"}
        if self.qk_norm:
            plan |= {f"layers.*.self_attn.{x}_norm": "replicated_with_grad_allreduce" for x in "qk"}
        if self.has_gates:
            plan["layers.*.self_attn.gate.fc_out"] = "colwise"
        return plan

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of `PretrainedConfig`; changes are checked as by the constructor.

        A changed scaling of the rotary embedding keeps the base, and a changed period no phase, unless they are changed
        too. A model without skips and with the period 1 forgets that period where the changes may bring skips.

        Raises:
            TypeError, ValueError: a change is wrong, or the changes name two bases, or what follows from the patterns.
        """
        need_no_worked_out(kwargs)
        for derived in DERIVED:
            if derived in kwargs:
                raise ValueError(f"{derived}={kwargs[derived]!r} follows from the patterns: change window or skips.")
        changes = {name: kwargs.pop(name, None) for name in ("rope_theta", "rope_parameters", "rope_scaling")}
        given = changes["rope_parameters"] or changes["rope_scaling"]
        base = _base(changes["rope_theta"], given)
        if base is not None or given is not None:
            saved = config_dict.get("rope_parameters") or {}
            base = base or saved.get("rope_theta") or config_dict.get("rope_theta")
            parameters = (saved if given is None else given) | ({} if base is None else {"rope_theta": base})
            config_dict = {k: v for k, v in config_dict.items() if k not in changes} | {"rope_parameters": parameters}
        changed = {name: kwargs.pop(name) for name in signature(cls.__init__).parameters if name in kwargs}
        window_alone = config_dict.get("skips") == 0 and config_dict.get("period") == 1
        if "period" in changed or (window_alone and changed.keys() & {"skips", "layer_patterns"}):
            config_dict = {name: value for name, value in config_dict.items() if name not in ("period", "phase")}
        return super().from_dict(config_dict | changed, **kwargs)

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding, the one in `rope_parameters`."""
        return float(self.rope_parameters["rope_theta"])

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = self.rope_parameters | {"rope_theta": value}

    @property
    def pattern(self) -> PiPattern:
        """The pattern of the "pi" layers."""
        return PiPattern.from_dict({field.name: getattr(self, field.name) for field in fields(PiPattern)})

    @property
    def has_gates(self) -> bool:
        """Whether some layer has a fusion gate: `gate`, where a layer has skips that it can weigh."""
        return self.gate and any(pattern.skips != 0 for pattern in self.patterns())

    def sizes(self) -> Sizes:
        """What the cost of the model depends on."""
        return Sizes(
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.vocab_size,
            gate_features=(self.gate_features or self.hidden_size) if self.has_gates else 0,
            gate_width=GATE_WIDTH if self.has_gates else 0,
        )

    def patterns(self) -> list[PiPattern]:
        """The pattern of every layer.

        Raises:
            TypeError, ValueError: an entry of layer_patterns is unknown or contradicts itself, or a pattern does not
                fit the number of heads.
        """
        patterns = stacked(self.layer_patterns, self.pattern, self.num_hidden_layers)
        for pattern in patterns:
            pattern.check_heads(self.num_attention_heads)
        return patterns


def _coordinated(entry: str | dict[str, Any], heads: int) -> str | dict[str, Any]:
    """An entry of layer_patterns of a model without skips: one that brings some, without a period, is coordinated."""
    if not isinstance(entry, dict) or "period" in entry or entry.get("skips", 0) == 0:
        return entry
    alike = coordinated_heads(1, 1, heads).to_dict()
    return {"period": alike["period"], "phase": alike["phase"]} | entry


def _rotary(theta: float | None, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """`rope_parameters` with the base in them, which may be given beside them instead."""
    return {"rope_type": "default"} | (parameters or {}) | {"rope_theta": _base(theta, parameters) or 10000.0}


def _base(theta: float | None, parameters: dict[str, Any] | None) -> float | None:
    """The base of the rotary embedding that is named, alone or among its parameters; ValueError for two."""
    inside = (parameters or {}).get("rope_theta")
    if None not in (theta, inside) and theta != inside:
        raise ValueError(f"rope_theta={theta} and {inside} in rope_parameters are one setting: give it once.")
    return theta or inside


def _words_of_the_library(patterns: list[PiPattern]) -> tuple[int | None, list[str]]:
    """`sliding_window` and `layer_types`, from which transformers makes caches: exact for every pattern without sinks.

    A reader that knows these words alone would drop sinks, so a layer with sinks is called full.
    """
    reaches = [None if pattern.sinks else pattern.reach for pattern in patterns]
    bounded = [reach for reach in reaches if reach is not None and reach < DENSE.window - 1]
    slides = [reach is not None and reach < DENSE.window - 1 for reach in reaches]
    types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return max(bounded) + 1 if bounded else None, types
