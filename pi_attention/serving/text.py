"""The text of tokens that come one by one, as whole characters, up to the first stop."""

from __future__ import annotations

from typing import Any

INCOMPLETE = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to."""


class Stop:
    """Finds a text in characters that come one by one, each read once: Knuth, Morris and Pratt's automaton.

    `begun` counts the last characters that are the first ones of the text.
    """

    def __init__(self, text: str) -> None:
        self._text, self.begun = text, 0
        self._shorter = [0]  # of each beginning: the longest end of it that is a beginning, too
        for letter in text[1:]:
            self._shorter.append(self._longest(letter, self._shorter[-1]))

    def read(self, letter: str) -> bool:
        """Whether the text ends with this character."""
        self.begun = self._longest(letter, self.begun)
        return self.begun == len(self._text)

    def _longest(self, letter: str, begun: int) -> int:
        while begun and self._text[begun] != letter:
            begun = self._shorter[begun - 1]
        return begun + (self._text[begun] == letter)


class GrowingText:
    """Decodes tokens as they come; all parts together are what the tokenizer decodes the tokens to, up to a stop.

    Args:
        tokenizer: of the model.
        stops: texts at which it ends; they are left out.
        skip_special_tokens: see `tokenizer.decode`.
    """

    def __init__(self, tokenizer: Any, stops: list[str], skip_special_tokens: bool = True) -> None:
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        self._stops = [Stop(stop) for stop in stops]
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
        start = len(self._held)
        whole = self._held + text
        for end, letter in enumerate(text, start + 1):
            found = [stop.begun for stop in self._stops if stop.read(letter)]
            if found:
                self.stopped = True
                return whole[: end - max(found)]
        kept = 0 if last else max((stop.begun for stop in self._stops), default=0)
        self._held = whole[len(whole) - kept :]
        return whole[: len(whole) - kept]


def up_to_a_stop(tokenizer: Any, tokens: list[int], stops: list[str], skip_special_tokens: bool = True) -> str:
    """The text of tokens, which are all there, up to the first stop."""
    text = GrowingText(tokenizer, stops, skip_special_tokens)
    parts = [text.step(None, token) for token in tokens]
    return "".join(part for part in [*parts, text.rest()] if part)
