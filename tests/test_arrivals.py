"""Continuous batching for any arrivals and cancellations: texts of `generate`, and the slots of all others are freed.

The manager's thread is left out: its steps are called one by one, so that requests come and go at any of them.
"""

from dataclasses import dataclass, field
from functools import cache
from queue import Empty

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served_models import MODELS, greedy, known, model_of, one_thread, small, wanted  # noqa: F401
from small_models import prompts_of

LONGEST, MOST = 60, 20
FEW = ["pi: layers of many kinds", "pi: skips without end", "llama: periods and phases of heads"]
"""Of dense layers and rings, of a cache whose prefixes are shared, and of rings with sinks alone."""
SOME_LENGTHS = st.sampled_from([1, 7, 25, LONGEST])

cached_model = cache(model_of)


@cache
def prompt_of(length, seed):
    return prompts_of([LONGEST], seed)[0][:length]  # those of a seed share their beginning


@cache
def longest_text(name, length, seed):
    return wanted(cached_model(name), prompt_of(length, seed), MOST)


def events(lengths):
    """What happens between the steps of the manager: a request comes, or an earlier one is cancelled."""
    step = st.tuples(st.just("step"), st.integers(1, 12))
    come = st.tuples(st.just("come"), lengths, st.integers(0, 1), st.integers(1, MOST))
    cancel = st.tuples(st.just("cancel"), st.integers(0, 9))
    later = st.lists(st.one_of(come, step, cancel), min_size=4, max_size=12)
    return st.builds(list.__add__, st.lists(come, min_size=2, max_size=6), later)


SETTINGS = {
    "page": st.sampled_from([4, 16]),
    "batch": st.sampled_from([8, 24, 200]),
    "slots": st.sampled_from([100, 120, 700]),
}
"""Tokens of a page, of a forward, and of each layer's cache: with the fewest, requests are evicted."""


@dataclass
class Stepped:
    """A manager whose steps are called, and what came out of it."""

    manager: object
    finished: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self):
        self.manager.batch_processor = self.processor = self.manager._create_batch_processor()
        self.manager.current_batch = 0
        self.allocators = self.processor.cache.cache_allocators.values()
        self.free = self.free_sectors()

    def free_sectors(self):
        self.processor.cache.evict_cached_blocks()  # kept for later prompts with the same prefix, of no request
        pool = self.processor.cache.pool
        pool.try_to_free_sectors()
        return pool.num_free_sectors

    def holders(self):
        """Requests that hold pages of any layer."""
        return {request for allocator in self.allocators for request, pages in allocator.block_table.items() if pages}

    def step(self):
        self.manager._wake_up_loop.set()  # nobody waits for requests here
        self.manager._generation_loop_body(self.processor, bootstrapping=False)
        while True:
            try:
                result = self.manager.output_router.output_queue.get_nowait()
            except Empty:
                return
            assert result.error is None and result.request_id not in self.finished
            self.finished[result.request_id] = result.generated_tokens

    def drain(self):
        for _ in range(3000):
            self.step()
            if not self.processor.has_pending_requests():
                return
        raise AssertionError("requests are left after 3,000 steps")


def check(name, happens, page, batch, slots):
    """Let it happen; every text that is due is that of `generate`, and nothing else comes or stays."""
    manager = cached_model(name).init_continuous_batching(
        generation_config=greedy(MOST),
        continuous_batching_config=small(page_size=page, max_batch_tokens=batch, num_blocks=-(-slots // page)),
    )
    stepped, due, gone = Stepped(manager), {}, set()
    for what, *how in happens:
        if what == "come":
            length, seed, tokens = how
            request = str(len(due) + len(gone))
            manager.add_request(prompt_of(length, seed), request_id=request, max_new_tokens=tokens)
            due[request] = longest_text(name, length, seed)[:tokens]
        elif what == "step":
            for _ in range(how[0]):
                stepped.step()
        elif (request := str(how[0])) in due:
            manager.cancel_request(request)
            if request not in stepped.finished:
                gone.add(request)
                del due[request]
            stepped.step()
            assert request not in stepped.holders()
    stepped.drain()
    assert stepped.finished == due
    assert not stepped.holders() and stepped.free_sectors() == stepped.free


@known
@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(FEW), happens=events(SOME_LENGTHS), **SETTINGS)
def test_any_arrivals_and_cancellations_leave_the_other_texts_as_they_are(name, happens, page, batch, slots):
    check(name, happens, page, batch, slots)


@known
@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(list(MODELS)), happens=events(st.integers(1, LONGEST)), **SETTINGS)
def test_any_arrivals_and_cancellations_of_any_model(name, happens, page, batch, slots):
    check(name, happens, page, batch, slots)


@known
@pytest.mark.parametrize("steps", [0, 1, 5], ids=["waits", "reads its prompt", "decodes"])
def test_a_cancelled_request_frees_its_slots_wherever_it_is(steps):
    """The prompt of 60 tokens takes three steps."""
    happens = [("come", LONGEST, 0, MOST), *[("step", steps)] * bool(steps), ("cancel", 0), ("come", 25, 1, MOST)]
    check("pi: layers of many kinds", happens, page=4, batch=24, slots=200)


@known
def test_a_request_that_lost_its_pages_comes_again_when_the_only_other_one_is_cancelled():
    """transformers' scheduler takes none after an eviction until another ends, and a cancelled one never does."""
    happens = [("come", LONGEST, 0, MOST), ("come", LONGEST, 1, MOST), ("step", 5), ("cancel", 0)]
    check("pi: skips without end", happens, page=4, batch=200, slots=120)
