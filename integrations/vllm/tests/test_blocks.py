"""Which blocks are kept, and which cached prefixes are taken, without an engine."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from pi_attention_vllm.blocks import SinkWindowManager, SinkWindowSpec, register_blocks

SIZE = 4
HEADS = {"num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}


def spec_of(reach, sinks):
    return SinkWindowSpec(block_size=SIZE, sliding_window=reach + 1, sinks=sinks, **HEADS)


def manager_of(reach, sinks, blocks=200):
    pool = BlockPool(num_gpu_blocks=blocks, enable_caching=True, hash_block_size=SIZE)
    given = {"enable_caching": True, "kv_cache_group_id": 0, "scheduler_block_size": SIZE}
    return SinkWindowManager(spec_of(reach, sinks), block_pool=pool, **given)


def test_both_kinds_are_registered_beside_those_of_vllm():
    register_blocks()
    register_blocks()
    assert KVCacheSpecRegistry.get_manager_class(spec_of(9, 2)) is SinkWindowManager
    for spec in (FullAttentionSpec, SlidingWindowSpec):
        more = {"sliding_window": 5} if spec is SlidingWindowSpec else {}
        manager = KVCacheSpecRegistry.get_manager_class(spec(block_size=SIZE, **HEADS, **more))
        assert manager not in (None, SinkWindowManager)


@pytest.mark.parametrize("reach", [0, 3, 10, 33])
@pytest.mark.parametrize("sinks", [0, 1, 4, 9])
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_what_the_next_query_sees_is_kept_and_the_rest_is_freed(reach, sinks, chunk):
    manager, most = manager_of(reach, sinks), 0
    bound = spec_of(reach, sinks).max_admission_blocks_per_request(max_in_flight_tokens=chunk, max_model_len=400)
    free = manager.block_pool.get_num_free_blocks()
    for past in range(0, 300, chunk):
        manager.remove_skipped_blocks("a", past)
        manager.allocate_new_blocks("a", past + chunk, past + chunk)
        blocks = manager.req_to_blocks["a"]
        seen = {p // SIZE for p in range(past + chunk) if p < sinks or p >= past - reach}
        assert not any(blocks[block].is_null for block in seen)
        most = max(most, sum(not block.is_null for block in blocks))
    assert bound - 2 <= most <= bound
    manager.free("a")
    assert manager.block_pool.get_num_free_blocks() == free


def hit(reach, sinks, cached, length, finer=1):
    """The blocks of a prefix of `length` tokens, of which `cached` are in the cache, with so many hashes a block."""
    blocks = {place: KVCacheBlock(block_id=place + 1) for place in cached}
    names = list(range(50 * finer))
    place_of = {(place + 1) * finer - 1: place for place in cached}  # a block's hash is the last of its tokens'
    pool = SimpleNamespace(
        null_block=KVCacheBlock(block_id=0),
        hash_block_size=SIZE // finer,
        get_cached_block=lambda name, groups: [blocks[place_of[name]]] * len(groups) if name in place_of else None,
    )
    found, tokens = SinkWindowManager.find_longest_cache_hit(
        block_hashes=names,
        max_length=length,
        kv_cache_group_ids=[0, 1],
        block_pool=pool,
        kv_cache_spec=spec_of(reach, sinks),
        drop_eagle_block=False,
        alignment_tokens=SIZE,
    )
    assert found[0] == found[1] and len(found[0]) * SIZE == tokens
    return [block.block_id - 1 for block in found[0]]


def test_a_prefix_is_taken_with_its_sinks_or_not_at_all():
    nothing = -1
    assert hit(reach=8, sinks=3, cached=range(10), length=40) == [0, *[nothing] * 7, 8, 9]
    assert hit(reach=8, sinks=5, cached=[0, 1, 8, 9], length=43) == [0, 1, *[nothing] * 6, 8, 9]
    assert hit(reach=8, sinks=5, cached=[0, 8, 9], length=40) == []
    assert hit(reach=8, sinks=0, cached=[8, 9], length=40) == [*[nothing] * 8, 8, 9]
    assert hit(reach=8, sinks=9, cached=[0, 1], length=40) == [0, 1]
    assert hit(reach=8, sinks=9, cached=[1, 2], length=40) == []


def test_hashes_finer_than_a_block_name_the_same_blocks():
    for finer in (1, 2, 4):
        assert hit(reach=8, sinks=5, cached=[0, 1, 8, 9], length=43, finer=finer) == [0, 1, *[-1] * 6, 8, 9]


def test_a_prefix_from_the_cache_is_held_and_given_back():
    manager = manager_of(reach=8, sinks=3)
    pool, free = manager.block_pool, manager.block_pool.get_num_free_blocks()
    earlier = pool.get_new_blocks(3)
    pool.free_blocks(earlier)
    found = [earlier[0], *[pool.null_block] * 7, *earlier[1:]]
    needed = manager.get_num_blocks_to_allocate("a", 44, found, 40, 40, 44)
    assert needed == 3 + 1  # those that nobody holds, and a new one
    manager.add_local_computed_blocks("a", found, 40, 0)
    manager.allocate_new_blocks("a", 44, 44)
    assert pool.get_num_free_blocks() == free - needed
    assert [block.is_null for block in manager.req_to_blocks["a"]] == [False, *[True] * 7, *[False] * 3]
    manager.remove_skipped_blocks("a", 60)
    assert [block.is_null for block in manager.req_to_blocks["a"]] == [False, *[True] * 10]
    manager.free("a")
    assert pool.get_num_free_blocks() == free


def test_the_blocks_of_the_sinks_are_worth_caching():
    def mask(sinks, start):
        return SinkWindowManager.reachable_block_mask(
            start, 16, 8 * SIZE, spec_of(8, sinks), use_eagle=False, retention_interval=None
        )

    assert mask(0, 0) == ([False] * 6 + [True] * 2) * 2
    assert mask(9, 0) == [True] * 3 + [False] * 3 + [True] * 2 + [False] * 6 + [True] * 2
    assert mask(9, 2) == [True] + [False] * 3 + [True] * 2 + [False] * 6 + [True] * 2
    assert mask(9, 8) == [False] * 6 + [True] * 2
