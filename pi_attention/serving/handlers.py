"""transformers' handlers of completions and chats, of one model, with checks of our own before any work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from jinja2 import TemplateError

from pi_attention.serving.engine import Engine
from pi_attention.serving.library import BaseHandler, ChatCompletionHandler, CompletionHandler, Modality
from pi_attention.serving.requests import (
    CHAT,
    COMPLETION,
    RequestError,
    Settings,
    check_fields,
    check_messages,
    check_prompt,
    settings_of,
)


class _OneModel(BaseHandler):
    """Before a handler of transformers: it asks these methods which model, which checks and which settings."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        manager = SimpleNamespace(get_model_modality=lambda *args, **kwargs: Modality.LLM)
        state = SimpleNamespace(use_continuous_batching=lambda *args: True, get_manager=lambda *args, **kwargs: engine)
        super().__init__(model_manager=manager, generation_state=state)

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return self.engine.name, self.engine.model, self.engine.tokenizer

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Settings:
        return settings_of(body, self.engine.limits, self.engine.defaults)


class Completions(_OneModel, CompletionHandler):
    """`/v1/completions`."""

    kind = "cmpl"

    def _validate_request(self, body: dict[str, Any]) -> None:
        check_fields(body, COMPLETION, self.engine.name)
        check_prompt(body)


class Chats(_OneModel, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    kind = "chatcmpl"

    def _validate_request(self, body: dict[str, Any]) -> None:
        check_fields(body, CHAT, self.engine.name)
        check_messages(body)
        if self.engine.tokenizer.chat_template is None:
            raise RequestError(
                f"the tokenizer of {self.engine.name!r} has no chat template: use /v1/completions, or start the "
                "server with --chat-template."
            )

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """As of transformers.

        Raises:
            RequestError: the template refuses the messages.
        """
        try:
            return await super().handle_request(body, request_id)
        except TemplateError as error:
            raise RequestError(f"the chat template refuses the messages: {error}", "messages") from error
