"""Which blocks of a request vLLM keeps: those with its first tokens, the sinks, and those that the pattern reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """A sliding window of reach + 1 tokens, and the first `sinks` tokens of the request."""

    sinks: int

    @property
    def sink_blocks(self) -> int:
        """How many blocks hold the sinks."""
        return cdiv(self.sinks, self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """The most blocks that a request holds at a time."""
        window = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(window + self.sink_blocks, cdiv(max_model_len, self.block_size))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all layers keep the same tokens."""
        return all(
            isinstance(spec, SinkWindowSpec) and (spec.sliding_window, spec.sinks) == (self.sliding_window, self.sinks)
            for spec in kv_cache_specs.values()
        )


class SinkWindowManager(SlidingWindowManager):
    """Frees the blocks between the sinks and the window, and takes a cached prefix only with its sinks."""

    kv_cache_spec: SinkWindowSpec

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """None: what is not kept does not begin at the first token, which is what vLLM asks for."""
        return 0

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what no later query sees."""
        skipped = super().get_num_skipped_tokens(processed_computed_tokens)
        self._remove_blocks_in_range(request_id, self.kv_cache_spec.sink_blocks, skipped // self.block_size)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: KVCacheSpec,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        """The blocks of the longest cached prefix, null blocks between sinks and window, and its length in tokens.

        Where a block of the sinks is gone, nothing is taken.
        """
        assert isinstance(kv_cache_spec, SinkWindowSpec)
        block_hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, kv_cache_spec.block_size)
        blocks, length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )
        for place in range(min(kv_cache_spec.sink_blocks, len(blocks[0]))):
            cached = block_pool.get_cached_block(block_hashes[place], kv_cache_group_ids)
            if cached is None:
                return tuple([] for _ in kv_cache_group_ids), 0
            for of_group, block in zip(blocks, cached, strict=True):
                of_group[place] = block
        return blocks, length

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, alignment_tokens: int | None, kv_cache_spec: KVCacheSpec, **kwargs: Any
    ) -> list[bool] | None:
        """Which of the blocks are worth caching; None for all. Those of the sinks are."""
        mask = super().reachable_block_mask(start_block, end_block, alignment_tokens, kv_cache_spec, **kwargs)
        assert isinstance(kv_cache_spec, SinkWindowSpec)
        if mask is None:
            return None
        sinks: Sequence[int] = range(start_block, min(end_block, kv_cache_spec.sink_blocks))
        return [True] * len(sinks) + mask[len(sinks) :]


def register_blocks() -> None:
    """Let vLLM know the specification and its manager; once is enough."""
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # registers its own first, which it does in an empty one alone
    KVCacheSpecRegistry.register(SinkWindowSpec, SinkWindowManager, uniform_type_base_spec=SinkWindowSpec)
