"""What of transformers' continuous batching is private: its manager, paged cache and allocators, a forward's arguments.

These names change with the minor versions of transformers, so this is the only file that knows them, and
`pi_attention.models.continuous.need_known_version` is asked before it is imported.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching import cache as library
from transformers.generation.continuous_batching.cache_allocators import SlidingAttentionCacheAllocator
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from pi_attention.models.ragged import RaggedCall, RaggedLayer, Requests, one_query_each
from pi_attention.ops.paged import Pages
from pi_attention.pattern import PiPattern

__all__ = [
    "SINKS",
    "BatchingManager",
    "ContinuousBatchingLogitsProcessor",
    "RingAllocator",
    "fatal_error",
    "forget",
    "install_allocator",
    "page_bytes",
    "paged_call",
    "process_logits",
    "running",
    "sector_bytes",
    "start",
]

SINKS = "pi_sinks"
"""Attribute of the configuration that the paged cache sees: how many of a request's first tokens are kept."""
SLIDING = SlidingAttentionCacheAllocator.layer_type


class RingAllocator(SlidingAttentionCacheAllocator):
    """Slots of a request: one for each sink, then a ring for the others; `sliding_window` is the number of both.

    The ring holds reach + 1 tokens: what a query can see, itself counted.
    """

    def __init__(self, index: int, config: Any, **kwargs: Any) -> None:
        super().__init__(index=index, config=config, **kwargs)
        self.sinks: int = getattr(config, SINKS)
        self.ring = self.sliding_window - self.sinks

    def _seen(self, past: int) -> tuple[range, range]:
        """Positions of the earlier tokens that the first new query, at position `past`, can see: sinks, then recent."""
        recent = max(0, past - (self.ring - 1))
        return range(min(self.sinks, recent)), range(recent, past)

    def _rows(self, request_id: str, positions: range) -> list[int]:
        """Rows of the cache tensor; those of one page follow one another."""
        pages, size = self.block_table[request_id], self.tokens_per_page
        rows: list[int] = []
        position = positions.start
        while position < positions.stop:
            in_ring = position >= self.sinks
            slot = self.sinks + (position - self.sinks) % self.ring if in_ring else position
            page, offset = divmod(slot, size)
            slots = self.sinks + self.ring if in_ring else self.sinks
            count = min(positions.stop - position, size - offset, slots - slot)
            first = pages[page] * self.block_physical_stride + offset
            rows.extend(range(first, first + count))
            position += count
        return rows

    def get_seqlen_k(self, past_length: int, query_length: int) -> int:
        """Keys of a request in a forward, the new ones included."""
        return sum(map(len, self._seen(past_length))) + query_length

    def get_read_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """Rows of the keys to read; the sentinel stands for a new one."""
        sinks, recent = (self._rows(request_id, positions) for positions in self._seen(past_length))
        return sinks + recent + [self.sentinel_index] * query_length

    def get_write_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """Rows for the new keys; those that no later query sees are written to the trash."""
        end = past_length + query_length
        sinks = range(past_length, min(end, self.sinks))
        recent = range(max(past_length, self.sinks, end - self.ring), end)
        trash: Any = self.write_trash_index
        passed = query_length - len(sinks) - len(recent)
        return self._rows(request_id, sinks) + [trash] * passed + self._rows(request_id, recent)


class _Allocators:
    """In the place of transformers' allocator for sliding layers: ours for our models, its own for every other one."""

    supports_block_table = False

    def __init__(self, usual: Any) -> None:
        self.usual = usual

    def __call__(self, *, config: Any, **kwargs: Any) -> Any:
        return (RingAllocator if hasattr(config, SINKS) else self.usual)(config=config, **kwargs)


def install_allocator() -> None:
    """Let transformers' paged cache ask for `RingAllocator` where the configuration has `SINKS`; once is enough."""
    kinds: dict[str, Any] = library.ATTN_TYPE_TO_ALLOCATOR
    if not isinstance(kinds[SLIDING], _Allocators):
        kinds[SLIDING] = _Allocators(kinds[SLIDING])


class PagedBatch:
    """What the layers of one allocator share in a forward: which keys each request has, and where they lie."""

    def __init__(self, allocator: Any, arguments: dict[str, Any], queries: list[int]) -> None:
        self.allocator = allocator
        ends = arguments["cu_seq_lens_k"][allocator.layer_type]
        self.requests = Requests(queries, [end - start for start, end in pairwise(ends.tolist())])
        self.written, slots = (arguments[name][allocator.index] for name in ("write_index", "read_index"))
        self.pages: Pages | None = None  # where every request decodes one token
        if slots.numel() and set(queries) == {1}:
            # A ring's new key takes the slot of one that is out of reach, so it may be written before they are read.
            slots = slots.index_copy(0, ends[1:].long() - 1, self.written)
            self.pages = Pages.of(self.requests.keys, slots)


class PagedLayer(RaggedLayer):
    """transformers' paged cache of one layer in one forward."""

    def __init__(
        self, layer: int, pattern: PiPattern, cache: Any, arguments: dict[str, Any], batch: PagedBatch
    ) -> None:
        super().__init__(pattern, batch.requests)
        self._layer, self._cache, self._arguments, self._batch = layer, cache, arguments, batch

    def extend(self, key: Tensor, value: Tensor, segment_ids: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
        """See `RaggedLayer`; where every request decodes one token, the keys and values of the whole cache.

        These are [slots, G, D].
        """
        if self._batch.pages is not None:
            stores = self._batch.allocator._kv_token_views[self._layer]
            for store, new in zip(stores, (key, value), strict=True):
                store.index_copy_(0, self._batch.written, new[0].transpose(0, 1))
            return *stores, None
        arguments = dict(self._arguments)  # which the cache changes
        key, value = self._cache.update(key_states=key, value_states=value, layer_idx=self._layer, kwargs=arguments)
        return key, value, None

    def attend(
        self, operator: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None
    ) -> Tensor:
        """See `RaggedKeys`; keys and values as `extend` returns them."""
        pages = self._batch.pages
        if pages is None:
            return super().attend(operator, query, key, value, gate)
        if self.moving is None:
            return one_query_each(operator, query, key, value, gate, None, pages)
        keys, values, ids = pages.gathered(key, value)  # a copy, since the pages keep sinks where they came
        self.moving.move(keys, slice(None), pages.first)
        return one_query_each(operator, query, keys, values, gate, ids)


def paged_call(cache: Any, arguments: dict[str, Any], patterns: list[PiPattern]) -> RaggedCall:
    """transformers' paged cache for one forward of ours.

    Args:
        cache: the `PagedAttentionCache`.
        arguments: what transformers passes to a forward beside tokens and positions.
        patterns: of the layers.
    """
    ends = arguments["cu_seq_lens_q"].tolist()
    queries = [end - start for start, end in pairwise(ends)]
    batches = {kind: PagedBatch(allocator, arguments, queries) for kind, allocator in cache.cache_allocators.items()}
    return RaggedCall(
        [
            PagedLayer(layer, pattern, cache, arguments, batches[cache.layer_to_allocator[layer].layer_type])
            for layer, pattern in enumerate(patterns)
        ]
    )


def page_bytes(config: Any, dtype: torch.dtype, page_size: int) -> int:
    """Bytes of the keys and values of one layer in one page."""
    return 2 * find_num_key_value_heads(config) * find_head_dim(config) * dtype.itemsize * page_size


def sector_bytes(config: Any, dtype: torch.dtype, page_size: int) -> int:
    """Bytes that the paged cache gives to one kind of layers at a time."""
    of_layers = [len(layers) for layers in library.group_layers_by_attn_type(config).values()]
    return math.lcm(128, *(count * page_bytes(config, dtype, page_size) for count in of_layers))


class BatchingManager(ContinuousBatchingManager):
    """transformers' manager; it takes new requests again where the last active one was cancelled.

    Its scheduler takes none after it has put one back for want of memory, until another one ends. Where all others
    are cancelled none ever does, and those that wait would wait for ever (transformers 5.23).
    """

    def _create_batch_processor(self) -> Any:
        made_before = self.batch_processor is not None
        processor = super()._create_batch_processor()
        if not made_before:
            scheduler = processor.scheduler
            usual = scheduler.clear_cancelled_requests  # called before each batch

            def clear_cancelled_requests() -> list[Any]:
                cancelled: list[Any] = usual()
                scheduler.block_new_requests &= bool(scheduler.active_requests)
                return cancelled

            scheduler.clear_cancelled_requests = clear_cancelled_requests
        return processor


def process_logits(manager: Any, processor: ContinuousBatchingLogitsProcessor) -> None:
    """Let a manager that has not started pass its logits through the processor, and through no other one."""
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([processor]))
    processors.tensors_required = 1
    manager.logit_processor = processors


class _Nowhere:
    """In the place of the queue of results that nobody waits for, in which those of cancelled requests would stay."""

    def put(self, output: Any) -> None:
        """Forget it."""


def start(manager: Any) -> None:
    """Make the cache and start a manager whose results go to handlers alone.

    Raises:
        MemoryError: the cache does not fit.
    """
    manager.output_router.output_queue = _Nowhere()
    manager.batch_processor = manager._create_batch_processor()
    manager.background_thread_status.clear()
    thread = threading.Thread(
        target=manager._run_generation_loop, daemon=True
    )  # `start` makes one that outlives errors
    manager._generation_thread = thread
    thread.start()


def forget(manager: Any, request_id: str) -> bool:
    """Take the handler of a request away; whether there was one, because the request has not ended."""
    router = manager.output_router
    with router._lock:
        return router.result_handlers.pop(request_id, None) is not None


def running(manager: Any) -> int:
    """How many requests of a manager that has started hold a part of the cache."""
    return len(manager.batch_processor.scheduler.active_requests)


def fatal_error(manager: Any) -> Exception | None:
    """What has ended the manager's thread, where it died."""
    error: Exception | None = manager.background_thread_status.fatal_error
    return error
