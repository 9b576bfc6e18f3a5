"""What of transformers' server is private: its handlers, a text as it grows, errors in a stream, chat templates.

These names change with the minor versions of transformers: `pi_attention.serving.needs.need_server` is asked before.
"""

from __future__ import annotations

from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import (
    BaseHandler,
    CBStreamer,
    Modality,
    build_response_parser,
    response_events_to_chunks,
)
from transformers.cli.serving.utils import _StreamError as StreamError
from transformers.utils.chat_template_utils import _compile_jinja_template as compile_template

__all__ = [
    "BaseHandler",
    "CBStreamer",
    "ChatCompletionHandler",
    "CompletionHandler",
    "Modality",
    "StreamError",
    "build_response_parser",
    "compile_template",
    "response_events_to_chunks",
]
