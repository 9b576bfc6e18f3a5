"""Heads beside language modelling: classification of sequences and tokens, question answering, masked tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import can_return_tuple

from pi_attention.models.configuration_pi import PiConfig
from pi_attention.models.modeling_pi import PiModel, PiPreTrainedModel


class PiForSequenceClassification(GenericForSequenceClassification, PiPreTrainedModel):
    """PiModel with a linear head on the last token that is no padding (by `pad_token_id`)."""

    accepts_loss_kwargs = False  # its loss ignores num_items_in_batch, so the Trainer must divide


class PiForTokenClassification(GenericForTokenClassification, PiPreTrainedModel):
    """PiModel with a linear head on every token."""

    accepts_loss_kwargs = False


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
