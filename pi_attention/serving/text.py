"""The text of tokens that come one by one, as whole characters, up to the first stop."""

from __future__ import annotations

from typing import Any

INCOMPLETE = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to."""


class GrowingText:
    """Decodes tokens as they come; all parts together are what the tokenizer decodes the tokens to, up to a stop.

    Args:
        tokenizer: of the model.
        stops: texts at which it ends; they are left out.
        skip_special_tokens: see `tokenizer.decode`.
    """

    def __init__(self, tokenizer: Any, stops: list[str], skip_special_tokens: bool = True) -> None:
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        self._stops = stops
        self._tokens: list[int] = []
        self._first, self._read = 0, 0  # where the decoded part begins, and how far it was given away
        self._held = ""  # may be the beginning of a stop
        self.stopped = False

    def step(self, _: Any, token: int) -> str | None:
        """What a token adds, or None: the interface of `tokenizers.decoders.DecodeStream`."""
        if self.stopped:
            return None
        self._tokens.append(token)
        return self._release(self._new(whole=False), last=False) or None

    def rest(self) -> str:
        """What was held back, at the end."""
        return "" if self.stopped else self._release(self._new(whole=True), last=True)

    def _new(self, whole: bool) -> str:
        """The text since the last character that was given away; nothing yet where it ends within a character."""
        before = self._decode(self._tokens[self._first : self._read])
        now = self._decode(self._tokens[self._first :])
        if now.endswith(INCOMPLETE) and not whole:
            return ""
        self._first, self._read = self._read, len(self._tokens)
        return now[len(before) :]

    def _release(self, text: str, last: bool) -> str:
        """What is certain to stand before any stop."""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        begun = [size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
        kept = 0 if last else max(begun, default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]
