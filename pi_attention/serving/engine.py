"""One model behind transformers' handlers: requests in, texts out, each freed when its client has gone."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from pi_attention.models.paged import fatal_error, forget, process_logits, running, start
from pi_attention.models.sampling import RequestSampling
from pi_attention.serving.answer import Answer
from pi_attention.serving.library import StreamError
from pi_attention.serving.memory import PAGE, blocks
from pi_attention.serving.requests import Limits, RequestError, Settings

HONOURED = {"do_sample", "eos_token_id", "max_new_tokens", "temperature", "top_k", "top_p"}
SILENT = {"bos_token_id", "cache_implementation", "max_length", "output_attentions", "output_hidden_states"}
SILENT |= {"pad_token_id", "transformers_version", "use_cache"}
"""Of a model's generation_config.json, what the server takes over, and what changes no text; it warns of the rest."""


SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""With `do_sample`, what transformers takes for the settings that a model's generation_config.json leaves out."""


class Engine:
    """A model and its running manager, as transformers' handlers ask for them.

    Args:
        model: PiForCausalLM, or what `convert` returns.
        tokenizer: of the model.
        name: by which requests call it.
        limits: of a request.
        requests: how many run at once; the cache has room for all of them at their longest.
        batch_tokens: tokens of a forward, by which long prompts are cut.

    Raises:
        ValueError: the tokenizer has tokens that the model has not, or the cache does not fit into the memory.
        NotImplementedError: the model cannot be served; see `init_continuous_batching`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, limits: Limits, requests: int = 32, batch_tokens: int = 512
    ) -> None:
        self.model, self.tokenizer, self.name, self.limits = model, tokenizer, name, limits
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise ValueError(
                f"the tokenizer has {len(tokenizer):,} tokens, and the model {model.config.vocab_size:,}: save the "
                "model's own tokenizer beside it."
            )
        self.defaults = _defaults(model.generation_config, limits)
        self.open: dict[str, Answer] = {}
        """Requests that run or wait."""
        self._reading = 0
        self._reader = ThreadPoolExecutor(1, "tokenizer")
        self.manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=model.generation_config.eos_token_id),
            ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=blocks(model, limits.request_tokens, requests),
                max_batch_tokens=max(batch_tokens, requests),
                max_requests_per_batch=requests,
                safety_margin=0.0,  # there is room for all
            ),
        )
        process_logits(self.manager, RequestSampling())
        try:
            start(self.manager)
        except MemoryError as error:
            raise ValueError(
                f"the cache of requests={requests} does not fit into the memory: take fewer, or lower "
                "max_prompt_tokens or max_new_tokens."
            ) from error

    async def read(self, tokenize: Callable[[], Any]) -> Any:
        """What a tokenizer makes of a prompt, one after another beside the event loop, which serves the others.

        Raises:
            RequestError: no further request is taken; nothing was tokenized.
        """
        if not self.alive():
            raise RequestError("the model has failed: the server must be started again.", status=503)
        taken = len(self.open) + self._reading
        if taken >= self.limits.open_requests:
            raise RequestError(f"{taken} requests run or wait: try again later.", status=429)
        self._reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, tokenize)
        finally:
            self._reading -= 1

    def init_cb(self, model: Any, settings: Settings) -> None:
        """Nothing: the manager has started, and each request brings its own settings."""

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, settings: Settings, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue[Any], Answer]:
        """As of transformers: the queue of the request's text, and the answer that fills it.

        Raises:
            RequestError: the request is refused.
        """
        prompt = inputs["input_ids"]
        self._admit(prompt, settings)
        queue: asyncio.Queue[Any] = asyncio.Queue()
        answer = Answer(self.manager, request_id, self.tokenizer, queue, settings.stop, response_parser)
        self.manager.register_result_handler(request_id, answer.take)
        self.open[request_id] = answer
        most = settings.max_new_tokens
        if self.manager.add_request(prompt, request_id, most, streaming=True, **settings.sampling) is None:
            raise RequestError("the server is stopping.", status=503)
        return queue, answer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, settings: Settings, request_id: str
    ) -> tuple[str, int, list[int]]:
        """As of transformers: the text, how many tokens the prompt has, and the new tokens.

        Raises:
            RequestError: the request is refused, or the model failed.
        """
        queue, answer = self.generate_streaming(model, processor, inputs, settings, request_id)
        parts: list[str] = []
        while (part := await queue.get()) is not None:
            if isinstance(part, StreamError):
                raise RequestError(str(answer.error), status=503)
            parts.append(part)
        return "".join(parts), len(inputs["input_ids"]), answer.tokens[: answer.total_tokens]

    def release(self, request_id: str) -> None:
        """Free what a request holds; nothing where it has finished or never began."""
        self.open.pop(request_id, None)
        if forget(self.manager, request_id):
            self.manager.cancel_request(request_id)

    def alive(self) -> bool:
        """Whether texts are generated."""
        return self.manager.is_running() and fatal_error(self.manager) is None

    def running(self) -> int:
        """Requests that hold a part of the cache."""
        return running(self.manager)

    def stop_answers(self) -> None:
        """End all texts with an error."""
        for answer in self.open.values():
            answer.fail("the server is stopping.")

    def close(self) -> None:
        """End the manager's thread; requests that run are failed."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        self.manager.stop(block=True, timeout=60, hard_stop=True)

    def _admit(self, prompt: list[int], settings: Settings) -> None:
        """Complete the settings, or refuse the request."""
        limits = self.limits
        if len(prompt) > limits.prompt_tokens:
            raise RequestError(
                f"the prompt has {len(prompt):,} tokens, and the limit is {limits.prompt_tokens:,}: shorten it.",
                code="context_length_exceeded",
            )
        settings.max_new_tokens = limits.of_text(len(prompt), settings.max_new_tokens)
        if settings.max_new_tokens < 1:
            raise RequestError(
                f"the prompt has {len(prompt):,} tokens and leaves no room for a text in the model's context of "
                f"{limits.context:,}: shorten it.",
                code="context_length_exceeded",
            )
        try:
            self.model.check_request(prompt, settings.max_new_tokens)
        except ValueError as error:
            raise RequestError(str(error)) from error


def _defaults(config: Any, limits: Limits) -> Settings:
    """Of a request that names no settings: those of the model's generation_config.json."""
    left_out = sorted(name for name in config.to_diff_dict().keys() - HONOURED - SILENT if not name.startswith("_"))
    if left_out:
        warnings.warn(f"the server leaves out {', '.join(left_out)} of the model's generation_config.", stacklevel=2)
    most = None if config.max_new_tokens is None else min(config.max_new_tokens, limits.new_tokens)
    if not config.do_sample:
        return Settings(most)
    given = {name: getattr(config, name) for name in SAMPLING}
    return Settings(most, **{name: SAMPLING[name] if value is None else value for name, value in given.items()})
