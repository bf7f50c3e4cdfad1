"""From token ids to text that is safe to send: incremental decoding and stop strings. Imports no torch."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextSource(Protocol):
    """Turns the tokens of one answer into text, piece by piece."""

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that is now certain; it may be empty."""

    def flush(self) -> str:
        """Return the text still held back, as it stands when no token follows."""


class Detokenizer:
    """Decodes a growing list of tokens.

    All pieces joined are exactly `decode` of all tokens, and no piece ends inside a character. Characters
    whose tokens have not all come are held back.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        byte_tokens: frozenset[int] = frozenset(),
        after: Sequence[int] = (),
    ) -> None:
        """Use `decode` for any run of tokens; `byte_tokens` are those of a byte-fallback vocabulary.

        With `after`, the tokens of a text, the pieces are what comes after it: a decoder that drops the space before
        a text's first word leaves it before these.
        """
        self._decode = decode
        self._byte_tokens = byte_tokens
        # Only the tokens from the last certain pieces on: a decoder may treat the first token of a text
        # in a way of its own (such as dropping its space), so the one before the new ones stays as context.
        self._window: list[int] = []
        self._context = 0
        self._sent = 0
        self._in_run = False
        for token_id in reversed(after):
            text = decode([token_id])
            # A special token is silent, and a part of a character would be taken for one with what follows.
            if text and token_id not in byte_tokens and REPLACEMENT not in text:
                self._window, self._context, self._sent = [token_id], 1, len(text)
                break

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that is now certain; it may be empty."""
        self._window.append(token_id)
        text = self._decode(self._window)
        # One more byte can turn a whole run of them into replacement characters, also behind a token without text.
        self._in_run = token_id in self._byte_tokens or (self._in_run and not self._decode([token_id]))
        if self._in_run:
            return ""
        if text.endswith(REPLACEMENT):
            # Only the last one can still become a character. Those before it are certain.
            return self._advance(text, len(text) - 1)
        piece = self._advance(text, len(text))
        if piece:
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._sent = len(self._decode(self._window))
            if not self._sent:  # these tokens are silent on their own, so they are no context
                self._context = 0
        return piece

    def flush(self) -> str:
        """Return the text still held back, as it stands when no token follows."""
        text = self._decode(self._window)
        return self._advance(text, len(text))

    def _advance(self, text: str, end: int) -> str:
        piece = text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece


class ByteDetokenizer:
    """Decodes a growing list of tokens whose bytes, one after the other, are those of the text, as at byte level.

    All pieces joined are the UTF-8 of all bytes, with a replacement character for each run that is none. Characters
    whose bytes have not all come are held back.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._held = b""

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that is now certain; it may be empty."""
        data = self._held + self._bytes_of(token_id)
        text, used = codecs.utf_8_decode(data, "replace")
        self._held = data[used:]
        return text

    def flush(self) -> str:
        """Return the text still held back, as it stands when no token follows."""
        held, self._held = self._held, b""
        return held.decode(errors="replace")


class StopStrings:
    """Finds the first of several strings in a text that comes in pieces.

    No character of the string found is ever returned: whatever may begin one is held back until it is
    certain. The time per character does not depend on the strings' lengths.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._matchers = [_Matcher(text) for text in strings]
        self._held = ""

    def push(self, text: str, may_stop: bool = True) -> tuple[str, bool]:
        """Return the text that may be sent, and whether a stop string came; what follows it is dropped.

        A string that is completed while `may_stop` is False counts as plain text.
        """
        if not self._matchers:
            return text, False
        whole = self._held + text
        start = len(whole)
        for matcher in self._matchers:
            for end, character in enumerate(text, start=len(self._held) + 1):
                if matcher.advance(character) and may_stop:
                    start = min(start, end - matcher.length)
                    break
        if start < len(whole):
            self._held = ""
            return whole[:start], True
        certain = len(whole) - max(matcher.matched for matcher in self._matchers)
        self._held = whole[certain:]
        return whole[:certain], False

    def flush(self) -> str:
        """Return the text held back, which turned out to begin no stop string."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """Knuth, Morris and Pratt's search for one string, a character at a time."""

    def __init__(self, text: str) -> None:
        self.length = len(text)
        self.matched = 0  # the longest proper beginning of the string that the text so far ends with
        self._text = text
        self._fallback = [0] * (len(text) + 1)
        matched = 0
        for end in range(1, len(text)):
            while matched and text[end] != text[matched]:
                matched = self._fallback[matched]
            matched += text[end] == text[matched]
            self._fallback[end + 1] = matched

    def advance(self, character: str) -> bool:
        """Take the next character; return whether the string is complete with it."""
        while self.matched and character != self._text[self.matched]:
            self.matched = self._fallback[self.matched]
        self.matched += character == self._text[self.matched]
        if self.matched < self.length:
            return False
        self.matched = self._fallback[self.matched]
        return True
