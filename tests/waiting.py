"""Waiting for a condition, or for another process's word, with a deadline."""

import select
import time

PATIENCE = 60
"""Seconds after which what a busy machine may be slow to do counts as not done."""


def eventually(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)
    return value


def next_line(stream, seconds=PATIENCE):
    """Return what a process writes next to its pipe, which must be one whole line."""
    assert select.select([stream], [], [], seconds)[0], f"nothing was written within {seconds} s"
    return stream.readline()
