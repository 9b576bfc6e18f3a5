"""Heads beside language modelling: classification of sequences and tokens, question answering, masked tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.utils import can_return_tuple

from pi_attention.models.configuration_pi import PiConfig
from pi_attention.models.loss import IGNORE, cross_entropy, share_of_mean
from pi_attention.models.modeling_pi import PiModel, PiPreTrainedModel


class PiForSequenceClassification(GenericForSequenceClassification, PiPreTrainedModel):
    """PiModel with a linear head on the last token that is no padding (by `pad_token_id`)."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits [B, num_labels], and with labels the mean loss, by `config.problem_type`.

        Args:
            input_ids, attention_mask, kwargs: see `PiModel`.
            labels: [B] classes or [B, num_labels] targets.
            num_items_in_batch: labels of the whole batch that this is a part of; the loss is its share of their mean.
        """
        given: Any = {"attention_mask": attention_mask, "labels": labels, "return_dict": True}
        outputs = super().forward(input_ids, **given, **kwargs)
        if labels is not None and num_items_in_batch is not None:
            outputs.loss = outputs.loss * (labels != IGNORE).sum() / num_items_in_batch
        return outputs


class PiForTokenClassification(GenericForTokenClassification, PiPreTrainedModel):
    """PiModel with a linear head on every token."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits [B, T, num_labels], and with labels [B, T] (−100 ignored) the mean loss.

        Args:
            input_ids, attention_mask, kwargs: see `PiModel`.
            labels: [B, T] classes.
            num_items_in_batch: labels of the whole batch that this is a part of; the loss is its share of their mean.
        """
        outputs = super().forward(input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        loss = None
        if labels is not None:
            loss = share_of_mean(cross_entropy(outputs.logits, labels), labels, num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=outputs.logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class PiForQuestionAnswering(GenericForQuestionAnswering, PiPreTrainedModel):
    """PiModel with start and end logits of every token."""


class PiForMaskedLM(PiPreTrainedModel):
    """Bidirectional PiModel (`PiConfig(causal=False)`) with a language-modelling head; labels are not shifted."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: PiConfig) -> None:
        if any(pattern.causal for pattern in config.patterns()):
            raise ValueError("PiForMaskedLM needs bidirectional patterns in every layer: set causal=False.")
        super().__init__(config)
        self.model = PiModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits [B, T, vocab], and with labels [B, T] (−100 where nothing is masked) the mean loss of masked tokens.

        Args:
            labels: [B, T] token ids, −100 to ignore.
            input_ids, attention_mask, position_ids, inputs_embeds, kwargs: see `PiModel`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
