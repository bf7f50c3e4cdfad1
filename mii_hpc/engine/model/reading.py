"""Tensors are read on threads before they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

THREADS = 4
"""A thread that copies pages of a file to a GPU is slower than either."""
AHEAD_BYTES = 2**30
"""So much is read ahead, or one tensor."""

T = TypeVar("T")


class Reader(Generic[T]):
    """Reads what is known to be asked for, on threads, a bounded number of bytes ahead.

    What is asked for in another order, twice, or without having been announced, is read as well, only later.
    """

    def __init__(self, read: Callable[[str], T], announced: Iterable[tuple[str, int]]) -> None:
        """Begin with the first of the names that are `announced`, with the bytes of each, in the order of the asking.

        `read` is called on several threads at once.
        """
        self._read = read
        self._announced = dict(announced)
        self._begun: dict[str, tuple[Future[T], int]] = {}
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="read")
        self._go_on()

    def read(self, name: str) -> T:
        """Return what `read` returns, or raise what it raises."""
        if name not in self._begun:
            self._announced.pop(name, None)
            return self._read(name)
        future, _ = self._begun.pop(name)
        self._go_on()
        return future.result()

    def close(self) -> None:
        """Forget what has not been asked for."""
        self._threads.shutdown(cancel_futures=True)
        self._begun.clear()

    def _go_on(self) -> None:
        ahead = sum(size for _, size in self._begun.values())
        while self._announced:
            name, size = next(iter(self._announced.items()))
            if self._begun and ahead + size > AHEAD_BYTES:
                return
            del self._announced[name]
            self._begun[name] = self._threads.submit(self._read, name), size
            ahead += size
