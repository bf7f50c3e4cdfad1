"""Answers that are good for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Remembered(Generic[T]):
    """The result of a question that is not asked again at once; those who want it meanwhile wait for the same."""

    def __init__(self, ask: Callable[[], Awaitable[T]], seconds: float) -> None:
        self._ask, self._seconds = ask, seconds
        self._asking = asyncio.Lock()
        self._until = float("-inf")
        self._result: T

    async def value(self) -> T:
        """Return the result. Raises what the question raises."""
        async with self._asking:
            if time.monotonic() > self._until:
                self._result = await self._ask()
                self._until = time.monotonic() + self._seconds
            return self._result
