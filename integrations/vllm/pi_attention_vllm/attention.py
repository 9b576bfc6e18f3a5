"""The attention of a layer in vLLM's terms: its cache, what a step concerns of it, and which keys are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from pi_attention.models.ragged import RaggedLayer, Requests
from pi_attention.pattern import PiPattern
from pi_attention_vllm.blocks import SinkWindowSpec


@dataclass
class Step:
    """The requests of one step, and where the tokens of a group of layers lie."""

    past: list[int]
    """Of each request, the tokens before the new ones."""
    new: list[int]
    """Of each request, the new tokens."""
    blocks: Tensor
    """[requests, most blocks], int32: the numbers of the blocks of each request."""
    slots: Tensor
    """[ΣT], int64: block · size + place of each new token."""
    _read: dict[tuple[int | None, int, int], Tensor] = field(default_factory=dict)
    _requests: dict[tuple[int | None, int], Requests] = field(default_factory=dict)

    def seen(self, pattern: PiPattern) -> list[list[range]]:
        """Positions of the tokens that each request reads, in order: sinks, the tokens in reach, the new ones."""
        found = []
        for past, new in zip(self.past, self.new, strict=True):
            first = 0 if pattern.reach is None else max(0, past - pattern.reach)
            found.append([range(min(pattern.sinks, first)), range(first, past + new)])
        return found

    def requests(self, pattern: PiPattern) -> Requests:
        """How many queries and keys each request has in a layer; once for layers alike."""
        key = (pattern.reach, pattern.sinks)
        if key not in self._requests:
            self._requests[key] = Requests(self.new, [sum(map(len, spans)) for spans in self.seen(pattern)])
        return self._requests[key]

    def slots_read(self, pattern: PiPattern, size: int) -> Tensor:
        """[ΣS], int64: the slots of the tokens that are read, for blocks of `size` tokens; once for layers alike."""
        key = (pattern.reach, pattern.sinks, size)
        if key not in self._read:
            seen = self.seen(pattern)
            spans = [torch.arange(span.start, span.stop) for of_request in seen for span in of_request]
            counts = torch.tensor([sum(map(len, of_request)) for of_request in seen])
            row = torch.arange(len(seen)).repeat_interleave(counts).to(self.blocks.device)
            position = torch.cat(spans).to(self.blocks.device)
            self._read[key] = self.blocks[row, position // size].long() * size + position % size
        return self._read[key]


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Makes a `Step` of what vLLM says to every backend."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        """Of the requests that are there, without padding."""
        common = common_attn_metadata
        ends = common.query_start_loc_cpu[: common.num_reqs + 1]
        new = ends.diff().tolist()
        lengths = common.seq_lens[: common.num_reqs].tolist()
        return Step(
            past=[length - tokens for length, tokens in zip(lengths, new, strict=True)],
            new=new,
            blocks=common.block_table_tensor[: common.num_reqs],
            slots=common.slot_mapping[: int(ends[-1])].long(),
        )


class PiBackend(AttentionBackend):
    """The attention of our layers, which are called by the model and not through vLLM's `Attention`."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """Of the backend."""
        return "PI_ATTENTION"

    @staticmethod
    def get_impl_cls() -> Any:
        """There is none: see `PagedKeys`."""
        raise NotImplementedError("pi-attention-vllm attends in the model, not in an implementation of vLLM's.")

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        """Of the metadata."""
        return StepBuilder


class PagedKeys(AttentionLayerBase):
    """The paged cache of one layer, which vLLM allocates and binds.

    Args:
        name: of the layer, with its index.
        pattern: of the layer.
        spec: what the cache holds of a request, without the size of a block.
    """

    kv_cache: Tensor

    def __init__(self, name: str, pattern: PiPattern, spec: dict[str, Any]) -> None:
        self.name, self.pattern, self._spec = name, pattern, spec
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        """See `AttentionLayerBase`."""
        return PiBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec:
        """Sinks and a window where the pattern is bounded, else every token."""
        kind = SinkWindowSpec if "sinks" in self._spec else FullAttentionSpec
        return kind(block_size=vllm_config.cache_config.block_size, **self._spec)


class PagedLayer(RaggedLayer):
    """The cache of one layer in one step.

    Args:
        keys: of the layer.
        step: of vLLM; None where it only measures memory, and nothing is cached.
        tokens: new ones, those that vLLM pads with included.
    """

    def __init__(self, keys: PagedKeys, step: Step | None, tokens: int) -> None:
        self._keys, self._step = keys, step
        super().__init__(keys.pattern, Requests([tokens], [tokens]) if step is None else step.requests(keys.pattern))

    def extend(self, key: Tensor, value: Tensor, segment_ids: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
        """See `RaggedLayer`."""
        step, cache = self._step, self._keys.kv_cache  # [blocks, G, size, 2 D]
        if step is None:
            return key, value, None
        if (key.shape[1], 2 * key.shape[3]) != (cache.shape[1], cache.shape[3]) or key.shape != value.shape:
            raise NotImplementedError(
                f"{self._keys.name} has keys {tuple(key.shape)} and values {tuple(value.shape)}, and its configuration "
                f"says {cache.shape[1]} heads of {cache.shape[3] // 2}: vLLM cannot serve heads that differ by layer."
            )
        size = cache.shape[2]
        new = torch.cat([key, value], dim=-1)[0, :, : len(step.slots)].transpose(0, 1)  # [ΣT, G, 2 D]
        cache[step.slots // size, :, step.slots % size] = new.to(cache.dtype)
        read = step.slots_read(self.pattern, size)
        key, value = cache[read // size, :, read % size].transpose(0, 1)[None].chunk(2, dim=-1)  # [1, G, ΣS, D]
        return key, value, None
