"""Memory of continuous batching over 100,000 tokens: what a request holds of the paged cache, and what requests share.

    python -m benchmarks.paged                       # writes results/paged.json

"growing" is one request: a prompt read in chunks, then decoded tokens. "evicted" is many requests, more than the pages
suffice for, so that the manager takes pages away and begins those requests anew; texts are compared with `generate`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.timing import machine, write
from pi_attention.models import PiConfig, PiForCausalLM

TOKENS = 100_000
OF_DENSE = 10_000
"""Tokens of the dense model, whose time grows with their square."""
POINTS = (1_000, OF_DENSE, TOKENS)
DECODED = 500
SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2 * TOKENS}
PATTERN = {"window": 64, "period": 64, "skips": 4, "sinks": 4, "gate": True}
PAGE, CHUNK = 16, 1024
REQUESTS, PROMPT, NEW = 256, 100, 300
PAGES_SHARED = 400
"""Pages of all layers that the requests of "evicted" share."""


def model_of(**settings: Any) -> PiForCausalLM:
    torch.manual_seed(0)
    model = PiForCausalLM(PiConfig(**SIZES | PATTERN | settings, eos_token_id=None, pad_token_id=0)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(4.0)  # texts that depend on what the layers see
    return model


def resident() -> int:
    """Bytes of the process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def held(cache: Any) -> int:
    """Bytes of the pages that requests hold."""
    allocators = cache.cache_allocators.values()
    return sum(len(pages) * x.bytes_per_block for x in allocators for pages in x.block_table.values())


class Watch:
    """What is held after each step of the manager, by the longest text so far; and how often requests were evicted."""

    def __init__(self, manager: Any) -> None:
        self.manager, self.most, self.evictions = manager, 0, 0
        self.by_length: dict[int, tuple[int, int]] = {}
        processor = manager.batch_processor
        self.cache = processor.cache
        update, offload = processor.update_batch, processor.offloading_manager.offload_requests

        def updated() -> None:
            update()
            states = list(processor.scheduler.active_requests.values())
            self.most = max(self.most, held(self.cache))
            for state in states:
                self.by_length[state.current_len()] = held(self.cache), resident()

        def offloaded() -> bool:
            waiting = len(processor.scheduler.waiting_requests)
            done = offload()
            self.evictions += len(processor.scheduler.waiting_requests) - waiting
            return done

        processor.update_batch, processor.offloading_manager.offload_requests = updated, offloaded

    @property
    def allocated(self) -> int:
        """Bytes of the whole paged cache."""
        return self.cache.cache_tensor.untyped_storage().nbytes()


def served(model: Any, prompts: list[list[int]], new: int, pages: int) -> tuple[Watch, dict[str, list[int]]]:
    """The prompts through the manager: what was watched, and the texts."""
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=CHUNK)
    with model.continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=settings
    ) as manager:
        while manager.batch_processor is None:
            manager.get_result(timeout=0.05)
        watch, found = Watch(manager), {}
        for number, prompt in enumerate(prompts):
            manager.add_request(prompt, request_id=str(number), max_new_tokens=new)
        while len(found) < len(prompts):
            result = manager.get_result(timeout=600)
            if result is None or result.error:
                raise RuntimeError(f"the manager gave no text: {result}")
            found[result.request_id] = result.generated_tokens
    return watch, found


def growing(name: str, tokens: int, pages: int, **settings: Any) -> list[dict[str, Any]]:
    """One request of so many tokens, in a cache of so many pages: bytes where it had as many tokens as `POINTS`."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 99, (tokens - DECODED,), generator=generator).tolist()
    watch, _ = served(model_of(**settings), [prompt], DECODED, pages)
    rows = []
    for point in [point for point in POINTS if point <= tokens]:
        at = min(length for length in watch.by_length if length >= min(point, max(watch.by_length)))
        bytes_held, process = watch.by_length[at]
        rows.append({"layers": name, "tokens": at, "bytes held": bytes_held, "bytes allocated": watch.allocated})
        rows[-1]["MiB of the process"] = round(process / 2**20, 1)
        print(rows[-1], flush=True)
    return rows


def evicted() -> dict[str, Any]:
    """Many requests over few pages; every text is compared with that of `generate`."""
    model, generator = model_of(), torch.Generator().manual_seed(2)
    prompts = torch.randint(3, 99, (REQUESTS, PROMPT), generator=generator)
    watch, texts = served(model, prompts.tolist(), NEW, PAGES_SHARED)
    want = model.generate(prompts, max_new_tokens=NEW, do_sample=False)[:, PROMPT:].tolist()
    equal = sum(texts[str(number)] == text for number, text in enumerate(want))
    row = {"requests": REQUESTS, "tokens": REQUESTS * (PROMPT + NEW), "equal texts": equal}
    row |= {"evictions": watch.evictions, "bytes held at most": watch.most, "bytes allocated": watch.allocated}
    print(row, flush=True)
    if equal != REQUESTS:
        raise SystemExit("texts differ from generate's: no result is written.")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(machine(), flush=True)
    torch.set_num_threads(1)  # beside the manager's own thread
    shared = evicted()
    rows = growing("pi", TOKENS, PAGES_SHARED)
    rows += growing("dense", OF_DENSE, OF_DENSE // PAGE + 8, layer_patterns=["dense"])
    head = {"model": SIZES | PATTERN, "page": PAGE, "dtype": "float32"}
    print(write("paged", head | {"growing": rows, "evicted": shared}))


if __name__ == "__main__":
    main()
