"""Requests through transformers' continuous batching: what they took, and whether their texts are those of `generate`.

The package's own check of the version, `need_known_version`, comes before this file is imported.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.paged import held
from pi_attention.models.paged import fatal_error, page_bytes
from pi_attention.serving.memory import PAGE, blocks

PAGE_OF_DENSE = 256
"""Tokens of a page of the dense model: transformers' default."""
OF_MEMORY = 0.5
"""The cache takes at most so much of a GPU's free memory; activations and the dense model's masks take the rest."""
TIE = 1e-3
"""Two tokens are equally likely where their float32 logits differ by less than so many standard deviations of all."""


class OutOfTime(Exception):
    """The budget was spent before all texts were there."""


class Failed(Exception):
    """The manager gave no text; the message says why."""


@dataclass
class Run:
    """What one run took.

    Attributes:
        seconds: from the arrival of all requests to the last token.
        first: seconds from there to each request's first token.
        texts: new tokens of each request.
        held: most bytes of pages that requests held at a time.
        allocated: bytes of the whole cache.
        at_once: most requests that held pages at a time.
    """

    seconds: float
    first: list[float]
    texts: list[list[int]]
    held: int
    allocated: int
    at_once: int


class Steps:
    """Watches a manager's steps: when each request has its first token, and what is held."""

    def __init__(self, processor: Any) -> None:
        self.first: dict[str, float] = {}
        self.held = self.at_once = 0
        self.cache, update = processor.cache, processor.update_batch
        self.allocated: int = self.cache.cache_tensor.untyped_storage().nbytes()

        def updated() -> None:
            active = dict(processor.scheduler.active_requests)
            self.held, self.at_once = max(self.held, held(self.cache)), max(self.at_once, len(active))
            update()
            now = time.perf_counter()
            self.first |= {name: now for name, x in active.items() if x.generated_tokens and name not in self.first}

        processor.update_batch = updated


def settings_of(model: Any, requests: int, tokens: int, batch_tokens: int) -> ContinuousBatchingConfig:
    """Settings with room for so many requests of so many tokens, or for as many as fit; the same for both models."""
    pi = hasattr(model.config, "patterns")
    page = PAGE if pi else PAGE_OF_DENSE
    wanted = blocks(model, tokens, requests) if pi else requests * -(-tokens // page) + 1
    room = wanted
    if model.device.type == "cuda":
        config = model.config.get_text_config()
        block = config.num_hidden_layers * page_bytes(config, model.dtype, page)
        room = int(OF_MEMORY * torch.cuda.mem_get_info(model.device)[0]) // block
    return ContinuousBatchingConfig(
        page_size=page,
        num_blocks=min(wanted, room),
        max_batch_tokens=max(batch_tokens, requests),
        max_requests_per_batch=requests,
        safety_margin=0.0 if wanted <= room else None,
        allow_block_sharing=False,
        auto_switch_to_flash=False,
        use_cuda_graph=False,
        use_async_batching=False,
    )


def serve(model: Any, prompts: list[list[int]], new: int, batch_tokens: int, deadline: float) -> Run:
    """All prompts at once through a manager of their own; greedy, `new` tokens each, none ends earlier.

    Args:
        deadline: of `time.monotonic`.

    Raises:
        OutOfTime: the deadline came first.
        Failed: a request or the manager failed.
    """
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    settings = settings_of(model, len(prompts), len(prompts[0]) + new, batch_tokens)
    manager = model.init_continuous_batching(generation_config=greedy, continuous_batching_config=settings)
    results: dict[str, Any] = {}
    manager.start()
    try:
        while manager.batch_processor is None:
            _need_running(manager, deadline)
            time.sleep(0.005)
        steps, begun = Steps(manager.batch_processor), time.perf_counter()
        for number, prompt in enumerate(prompts):
            manager.add_request(prompt, request_id=str(number), max_new_tokens=new)
        while len(results) < len(prompts):
            _need_running(manager, deadline)
            if (result := manager.get_result(timeout=1)) is not None:
                if result.error:
                    raise Failed(result.error)
                results[result.request_id] = result.generated_tokens
        ended = time.perf_counter()
    finally:
        manager.stop(hard_stop=True)
    names = [str(number) for number in range(len(prompts))]
    first = [steps.first[name] - begun for name in names]
    texts = [results[name] for name in names]
    return Run(ended - begun, first, texts, steps.held, steps.allocated, steps.at_once)


def _need_running(manager: Any, deadline: float) -> None:
    if (error := fatal_error(manager)) is not None:
        raise Failed(f"{type(error).__name__}: {error}")
    if time.monotonic() > deadline:
        raise OutOfTime


def figures(runs: list[Run]) -> dict[str, Any]:
    """Medians of runs of the same requests."""
    tokens = sum(len(text) for text in runs[0].texts)
    return {
        "runs": len(runs),
        "seconds": median(run.seconds for run in runs),
        "new tokens/s": tokens / median(run.seconds for run in runs),
        "first token s": median(median(run.first) for run in runs),
        "last first token s": median(max(run.first) for run in runs),
        "bytes held": max(run.held for run in runs),
        "bytes allocated": runs[0].allocated,
        "at once": max(run.at_once for run in runs),
    }


def compare(model: Any, prompts: list[list[int]], texts: list[list[int]]) -> dict[str, int]:
    """How many texts are those of `generate`, token for token, and how many leave it where two tokens tie.

    Raises:
        Failed: a text differs otherwise.
    """
    counts = {"compared": len(texts), "equal": 0, "ties": 0}
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        out = model.generate(
            torch.tensor([prompt], device=model.device),
            max_new_tokens=len(text),
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        wanted = out.sequences[0, len(prompt) :].tolist()
        if text == wanted:
            counts["equal"] += 1
            continue
        at = next(i for i, (a, b) in enumerate(zip(text, wanted, strict=True)) if a != b)
        logits = out.logits[at][0].float()
        gap = float((logits[wanted[at]] - logits[text[at]]) / logits.std())
        if gap > TIE:
            raise Failed(f"request {number} differs from generate at new token {at}, by {gap:.2g} deviations")
        counts["ties"] += 1
    return counts
