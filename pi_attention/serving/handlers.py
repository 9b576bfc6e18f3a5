"""transformers' handlers of completions and chats, of one model, with checks of our own before any work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from pi_attention.paths import shown
from pi_attention.serving.engine import Engine
from pi_attention.serving.library import (
    BaseHandler,
    ChatCompletionHandler,
    CompletionHandler,
    Modality,
    build_response_parser,
    compile_template,
)
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
from pi_attention.serving.text import up_to_a_stop

READ = "prompt as it was read"
"""Beside a body's own fields: its `Prompt`."""


def read_template(path: Path) -> str:
    """The chat template in a file.

    Raises:
        ValueError: it is not UTF-8, or no Jinja template.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        compile_template(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"chat_template={shown(path)} is not UTF-8: convert the file to UTF-8.") from error
    except TemplateSyntaxError as error:
        raise ValueError(
            f"chat_template={shown(path)} is no Jinja template, line {error.lineno}: {error.message}"
        ) from error
    return text


class Prompt:
    """What the tokenizer made of a prompt: transformers' handlers get it where they ask the tokenizer.

    Args:
        tokenizer: of the model.
        inputs: `input_ids`, and what else the tokenizer gives.
        settings: of the request.
    """

    def __init__(self, tokenizer: Any, inputs: Any, settings: Settings) -> None:
        self._tokenizer, self._inputs, self.settings = tokenizer, inputs, settings
        self.response_template = getattr(tokenizer, "response_template", None)
        self.decode = tokenizer.decode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As of a tokenizer."""
        return self._inputs

    apply_chat_template = __call__

    def parse_response(self, tokens: list[int], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As of a tokenizer, up to the first stop; what the template cannot parse is the content as it is."""
        stops = self.settings.stop
        text = up_to_a_stop(self._tokenizer, tokens, stops, skip_special_tokens=False)
        try:
            return self._tokenizer.parse_response(text, *args, **kwargs)
        except (ValueError, KeyError):
            return {"content": up_to_a_stop(self._tokenizer, tokens, stops)}


class _OneModel(BaseHandler):
    """Before a handler of transformers: it asks these methods which model, which checks and which settings."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        manager = SimpleNamespace(get_model_modality=lambda *args, **kwargs: Modality.LLM)
        state = SimpleNamespace(use_continuous_batching=lambda *args: True, get_manager=lambda *args, **kwargs: engine)
        super().__init__(model_manager=manager, generation_state=state)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """As of transformers.

        Raises:
            RequestError: the request is refused.
        """
        self.check(body)
        settings = settings_of(body, self.engine.limits, self.engine.defaults)
        inputs = await self.engine.read(lambda: self.tokenized(body))
        prompt = Prompt(self.engine.tokenizer, inputs, settings)
        return await super().handle_request(body | {READ: prompt}, request_id)

    def check(self, body: dict[str, Any]) -> None:
        """Refuse what this route does not do."""
        raise NotImplementedError

    def tokenized(self, body: dict[str, Any]) -> Any:
        """What the tokenizer makes of the request's prompt."""
        raise NotImplementedError

    def _validate_request(self, body: dict[str, Any]) -> None:
        """Nothing: it was checked."""

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return self.engine.name, self.engine.model, body[READ]

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Settings:
        return body[READ].settings


class Completions(_OneModel, CompletionHandler):
    """`/v1/completions`."""

    kind = "cmpl"

    def check(self, body: dict[str, Any]) -> None:
        """Refuse what is no completion."""
        check_fields(body, COMPLETION, self.engine.name)
        check_prompt(body)

    def tokenized(self, body: dict[str, Any]) -> Any:
        """The prompt with the tokenizer's special tokens, as transformers' own server reads it."""
        return self.engine.tokenizer(body["prompt"])


class Chats(_OneModel, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    kind = "chatcmpl"

    def check(self, body: dict[str, Any]) -> None:
        """Refuse what is no chat, and chats without a template."""
        check_fields(body, CHAT, self.engine.name)
        check_messages(body)
        if self.engine.tokenizer.chat_template is None:
            raise RequestError(
                f"the tokenizer of {self.engine.name!r} has no chat template: use /v1/completions, or start the "
                "server with --chat-template."
            )

    def tokenized(self, body: dict[str, Any]) -> Any:
        """The conversation in the words of the template.

        Raises:
            RequestError: the template refuses the messages, or the answers to them cannot be parsed.
        """
        tokenizer = self.engine.tokenizer
        messages = self.get_processor_inputs_from_messages(body["messages"], Modality.LLM)
        try:
            inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:  # a template is a program
            raise RequestError(f"the chat template refuses the messages: {error}", "messages") from error
        try:
            build_response_parser(tokenizer, self.engine.model, inputs["input_ids"])
        except (LookupError, TypeError, ValueError) as error:
            raise RequestError(f"the tokenizer's response_template does not serve: {error}", status=500) from error
        return inputs
