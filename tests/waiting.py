"""Waiting for a condition, or for another process's word, with a deadline."""

import asyncio
import select
import time
from collections.abc import Callable
from typing import IO, Any, TypeVar

PATIENCE = 60
"""Seconds after which what a busy machine may be slow to do counts as not done."""

T = TypeVar("T")


def eventually(condition: Callable[[], T], seconds: float = PATIENCE, what: str = "", pause: float = 0.02) -> T:
    """Return what `condition` gives once it is true; fail when it is not in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or condition}"
        time.sleep(pause)
    return value


async def until(condition: Callable[[], T], seconds: float = PATIENCE, what: str = "") -> T:
    """Do the same without blocking the event loop, in which the condition is looked at."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or condition}"
        await asyncio.sleep(0.005)
    return value


def next_line(stream: IO[Any], seconds: float = PATIENCE) -> Any:
    """Return what a process writes next to its pipe, which must be one whole line."""
    assert select.select([stream], [], [], seconds)[0], f"nothing was written within {seconds} s"
    return stream.readline()
