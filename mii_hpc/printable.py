"""Text by others, made fit to be shown: a terminal obeys what it is sent."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""Return a text with an escape such as \x1b in the place of each character that is not printed, but for `keep`.

    Those are control characters, line ends, and what turns the direction of writing round.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
