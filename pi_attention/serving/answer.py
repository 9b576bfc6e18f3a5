"""The answer to one request, as it grows."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from pi_attention.serving.library import CBStreamer, StreamError, response_events_to_chunks
from pi_attention.serving.text import GrowingText


class Answer(CBStreamer):
    """The text of one request: `take` gets what the model generated so far, the queue what the client has not read."""

    def __init__(
        self, manager: Any, request_id: str, tokenizer: Any, queue: asyncio.Queue[Any], stops: list[str], parser: Any
    ) -> None:
        super().__init__(manager, request_id, None, asyncio.get_running_loop(), queue, parser)
        self._decode_stream = GrowingText(tokenizer, stops, skip_special_tokens=parser is None)
        self.tokens: list[int] = []
        self.error: str | None = None
        self._over = False

    def take(self, output: Any) -> None:
        """Pass on what is new in the manager's output; the end, or an error, is passed on once."""
        if self._over:
            return
        if output.error is not None:
            self.fail(f"the model failed: {output.error}")
            return
        self.tokens = output.generated_tokens
        try:
            self.put(output)
            if output.is_finished() or self._decode_stream.stopped:
                self.end()
                self._over = True
        except (ValueError, KeyError) as error:  # the outputs of other requests are taken after this one
            self.fail(f"the tokenizer's response_template cannot parse the answer: {error}")
        if self._over:
            self.cancel()  # without effect on a request that has finished

    def fail(self, message: str) -> None:
        """Pass an error on, in the place of the rest."""
        if not self._over:
            self._over, self.error = True, message
            self._queue.put_nowait(StreamError(json.dumps(message)[1:-1]))  # transformers writes it between quotes

    def end(self) -> None:
        """Pass on what was held back, then the end."""
        rest = self._decode_stream.rest()
        for item in [rest] if self._parser is None else response_events_to_chunks(self._parser.feed(rest)):
            if item:
                self._queue.put_nowait(item)
        super().end()
