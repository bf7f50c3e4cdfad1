import pytest

from mii_hpc.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 漢 😀", "plain ü 漢 😀"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\u202eb\u2028", "a\\u202eb\\u2028"),
        ("a\nb\tc\r", "a\nb\tc\\r"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text, shown):
    assert printable(text, keep="\n\t") == shown
