"""The models in vLLM: modules of transformers, vLLM's scheduler and cache, and our operator between them."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import MoeModelOutputWithPast
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.interfaces_base import VllmModelForTextGeneration

from pi_attention.convert import PiConvertedForCausalLM
from pi_attention.convert.interface import ConvertedCall
from pi_attention.models.ragged import Bounded, RaggedCall
from pi_attention.pattern import PiPattern
from pi_attention_vllm.attention import PagedKeys, PagedLayer, Step
from pi_attention_vllm.served import need_served


class PiModelForVllm(nn.Module, VllmModelForTextGeneration):
    """`PiForCausalLM`, or what `convert` returned, as vLLM calls a model: tokens of all requests one behind another."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        need_served(vllm_config)
        config = vllm_config.model_config.hf_config
        with no_init_weights():
            self.hf = AutoModelForCausalLM.from_config(config, dtype=vllm_config.model_config.dtype).eval()
        self.hf.tie_weights()
        causal: Any = self.hf.model if isinstance(self.hf, PiConvertedForCausalLM) else self.hf
        self._parts = (getattr(causal, causal.base_model_prefix), _head_of(causal))  # a tuple hides them from nn.Module
        self._patterns = config.patterns()
        layers = _paged_keys(self._patterns, config.get_text_config(), vllm_config.model_config.dtype, prefix)
        vllm_config.compilation_config.static_forward_context.update({keys.name: keys for keys in layers})
        self._layers = layers

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[ΣT] -> [ΣT, hidden]."""
        return self.hf.get_input_embeddings()(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states [ΣT, hidden] of tokens [ΣT] at positions [ΣT]."""
        embeds = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        steps: dict[str, Step] | None = get_forward_context().attn_metadata
        layers = [PagedLayer(keys, None if steps is None else steps[keys.name], len(embeds)) for keys in self._layers]
        call = RaggedCall(layers)
        more: dict[str, Any] = {}
        if isinstance(self.hf, PiConvertedForCausalLM):
            more["attention_mask"] = call.library_mask(None, embeds[None])
            more["pi_call"] = ConvertedCall(self._patterns, None, call)
        decoder = self._parts[0]
        out = decoder(
            inputs_embeds=embeds[None], position_ids=positions[None], past_key_values=call, use_cache=False, **more
        )
        return out.last_hidden_state[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [rows, vocab] of hidden states [rows, hidden]."""
        return self._parts[1](inputs_embeds=hidden_states[None]).logits[0]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy the tensors of a checkpoint, one by one; returns the names of the parameters, all of which it must hold.

        Raises:
            ValueError: it holds a tensor that the model has not, or of another shape, or lacks one.
        """
        own, loaded = self.hf.state_dict(), set()
        for name, tensor in weights:
            if name not in own or own[name].shape != tensor.shape:
                have = f"of shape {tuple(own[name].shape)}" if name in own else "not there"
                raise ValueError(
                    f"the checkpoint holds {name} {tuple(tensor.shape)}, which in the model is {have}: the folder's "
                    "config.json and its weights are of different models."
                )
            own[name].copy_(tensor)
            loaded.add(own[name].data_ptr())
        missing = [name for name, tensor in own.items() if tensor.data_ptr() not in loaded]  # tied ones are one tensor
        if missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors of the model, the first is {missing[0]}.")
        return {name for name, _ in self.named_parameters()}


class _Given(nn.Module):
    """In the place of a decoder: its hidden states are those that it is given."""

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def _head_of(causal: PreTrainedModel) -> nn.Module:
    """The model without its decoder: hidden states to logits, with whatever it scales or caps them by."""
    head = copy(causal)
    head._modules = causal._modules | {causal.base_model_prefix: _Given()}
    return head


def _paged_keys(patterns: list[PiPattern], config: Any, dtype: torch.dtype, prefix: str) -> list[PagedKeys]:
    """The caches of the layers; bounded layers share the longest reach and the most sinks, and so their blocks."""
    heads = config.num_attention_heads
    sizes = {
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_size": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "dtype": dtype,
    }
    bounded = Bounded.among(patterns)
    kept = {"sliding_window": bounded.reach + 1, "sinks": bounded.sinks}
    start = f"{prefix}." if prefix else ""
    return [
        PagedKeys(f"{start}layers.{layer}.attn", pattern, sizes | (kept if pattern in bounded.patterns else {}))
        for layer, pattern in enumerate(patterns)
    ]
