"""Checks of a request's body: what the server does not do is refused by its name, never ignored."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

SHARED = {"model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream"}
COMPLETION = SHARED | {"prompt"}
CHAT = SHARED | {"messages", "max_completion_tokens"}
WITHOUT_EFFECT = {"user": str, "safety_identifier": str, "stream_options": dict}
"""With their kinds: who asks changes no text, and the last part of a stream always counts the tokens."""
ONLY: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
}
"""Fields of OpenAI's that are taken where they ask for nothing; null always does."""
STOPS = 4
STOP_CHARACTERS = 1000
"""Of each stop, as many as it may have."""


class RequestError(Exception):
    """A request that is refused: the status, and what is wrong in words for the client."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    prompt_tokens: int
    new_tokens: int
    context: int
    """Tokens of the model's context, at which a text ends that names no `max_tokens`."""
    open_requests: int
    """Requests that run or wait; further ones are refused."""
    ends_at_context: bool = False
    """Whether every text ends at the context, whatever it asks for: some layers would see further than they learned."""

    @property
    def request_tokens(self) -> int:
        """Most tokens of a prompt and its text."""
        most = self.prompt_tokens + self.new_tokens
        return min(most, self.context) if self.ends_at_context else most

    def of_text(self, prompt: int, asked: int | None) -> int:
        """Most new tokens behind a prompt of so many; 0 or fewer leave no room."""
        room = self.context - prompt
        if self.ends_at_context:
            return min(asked or self.new_tokens, room)
        return asked or (min(self.new_tokens, room) if room > 0 else self.new_tokens)

    @property
    def body_bytes(self) -> int:
        """Of a body: no token is as long as this allows each to be."""
        return (1 << 20) + 64 * self.prompt_tokens


@dataclass
class Settings:
    """How a text is generated. `max_new_tokens` is None until the length of the prompt is known."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = field(default_factory=lambda: secrets.randbits(63))
    stop: list[str] = field(default_factory=list)

    @property
    def sampling(self) -> dict[str, Any]:
        """For `RequestSampling`."""
        floats = {"temperature": float(self.temperature), "top_p": float(self.top_p)}
        return floats | {"top_k": self.top_k, "seed": self.seed}


def check_fields(body: dict[str, Any], known: set[str], model: str) -> None:
    """Refuse other models and fields that would have no effect.

    Raises:
        RequestError: 404 for another model, 400 for a field.
    """
    asked = body.get("model")
    if asked is not None and asked != model:
        named = _shown(asked) if isinstance(asked, str) else "that is no text"
        raise RequestError(
            f"the model {named} is not served here: use {model!r}.", "model", status=404, code="model_not_found"
        )
    for name, value in body.items():
        if name in known or value is None:
            continue
        if name in WITHOUT_EFFECT:
            if not isinstance(value, WITHOUT_EFFECT[name]):
                raise RequestError(f"{name} must be {'an object' if name == 'stream_options' else 'a text'}.", name)
        elif name not in ONLY:
            raise RequestError(f"{_shown(name)} is no field of this request: leave it out.")
        elif isinstance(value, bool) != isinstance(ONLY[name][0], bool) or value not in ONLY[name]:  # 1 is not true
            raise RequestError(f"{name} is not supported: leave it out, or give {ONLY[name][0]!r}.", name)


def settings_of(body: dict[str, Any], limits: Limits, defaults: Settings) -> Settings:
    """The settings that a request asks for.

    Raises:
        RequestError: a value is of another kind or out of range.
    """
    settings = Settings(defaults.max_new_tokens, defaults.temperature, defaults.top_k, defaults.top_p)
    for name in ("max_tokens", "max_completion_tokens"):
        settings.max_new_tokens = _whole(body, name, settings.max_new_tokens, 1, limits.new_tokens)
    settings.temperature = _real(body, "temperature", settings.temperature, 2.0)
    if 0 < settings.temperature < 1e-3:
        raise RequestError("temperature must be 0, which takes the likeliest token, or at least 0.001.", "temperature")
    settings.top_p = _real(body, "top_p", settings.top_p, 1.0)
    if settings.top_p == 0:
        raise RequestError("top_p must be above 0; temperature 0 takes the likeliest token.", "top_p")
    settings.top_k = _whole(body, "top_k", settings.top_k, 0, 2**31 - 1)
    settings.seed = _whole(body, "seed", settings.seed, 0, 2**63 - 1)
    settings.stop = _stops(body)
    if not isinstance(body.get("stream"), bool | None):
        raise RequestError("stream must be true or false.", "stream")
    return settings


def check_prompt(body: dict[str, Any]) -> None:
    """Refuse what is no text to continue, such as a list of tokens or of texts."""
    if not isinstance(body.get("prompt"), str):
        raise RequestError("prompt must be one text: send lists as one request each.", "prompt")
    _need_unicode(body["prompt"], "prompt")


def check_messages(body: dict[str, Any]) -> None:
    """Refuse messages that are no conversation of texts."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one message.", "messages")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"{where} must be an object with a role, such as 'user', and a content.", "messages")
        if not isinstance(message.get("name"), str | None):
            raise RequestError(f"{where}.name must be a text.", "messages")
        _need_unicode(message["role"] + (message.get("name") or ""), where)
        if set(message) - {"role", "content", "name"}:
            raise RequestError(f"{where} holds more than role, content and name: no tools are called here.", "messages")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise RequestError(f"{where}.content must be a text, or a list of parts of type 'text'.", "messages")
        for part in parts:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestError(f"{where}.content must be text: the model takes nothing else.", "messages")
            _need_unicode(part["text"], where)


def _stops(body: dict[str, Any]) -> list[str]:
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise RequestError("stop must be a text, or a list of texts, none of them empty.", "stop")
    if len(stops) > STOPS:
        raise RequestError(f"stop must hold at most {STOPS} texts, got {len(stops)}.", "stop")
    longest = max(map(len, stops), default=0)
    if longest > STOP_CHARACTERS:
        raise RequestError(f"stop must have at most {STOP_CHARACTERS:,} characters a text, got {longest:,}.", "stop")
    return stops


def _need_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} holds half of a surrogate pair: send whole characters.", name) from None


def _shown(text: str) -> str:
    """Between quotes, with what UTF-8 cannot express escaped, and cut."""
    shown = repr(text)
    return shown if len(shown) <= 100 else shown[:100] + "…'"


def _whole(body: dict[str, Any], name: str, default: Any, least: int, most: int) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise RequestError(f"{name} must be a whole number from {least:,} to {most:,}.", name)
    return value


def _real(body: dict[str, Any], name: str, default: float, most: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not 0 <= value <= most:  # not a number lies nowhere
        raise RequestError(f"{name} must be a number from 0 to {most:g}.", name)
    return float(value)
