"""Text by others, made fit to be shown: a terminal obeys what it is sent."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterable


def printable(text: str, keep: str = "") -> str:
    r"""Return a text with an escape such as \x1b in the place of each character that is not printed, but for `keep`.

    Those are control characters, line ends, and what turns the direction of writing round.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else _escaped(each) for each in text)


def one_line(text: object, length: int = 300) -> str:
    """Return a text, such as another library's error, as part of a sentence: printable, in one line, not long."""
    words = printable(" ".join(str(text).split()))
    return words if len(words) <= length else f"{words[:length]}..."


def listed(items: Iterable[object], count: int, most: int = 5) -> str:
    """Return the first few of so many items, and how many more there are."""
    few = ", ".join(map(str, itertools.islice(items, most)))
    return f"{few} and {count - most} more" if count > most else few


def shown(value: object, length: int = 80) -> str:
    """Return a value as Python writes it, as far as that is short: also one that Python does not like to write."""
    if isinstance(value, int) and value.bit_length() > 4 * length:
        return f"a number of {value.bit_length()} bits"
    writer = reprlib.Repr()
    writer.maxstring = writer.maxother = writer.maxlong = 2 * length
    try:
        return one_line(writer.repr(value), length)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
