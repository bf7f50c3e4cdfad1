"""The background tasks of a process: none ends unnoticed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Tasks:
    """The background tasks of one process; the first that fails ends what the process is there for.

    Belongs to the event loop that it is made in.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task and return it. It may be cancelled; if it raises, guard() does."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._on_end)
        return task

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Do what the process is there for, as long as no task fails, and return its result.

        Raises what the first task to fail has raised; the work is cancelled then. No task runs on return.
        """
        main = asyncio.create_task(work)
        try:
            either: set[asyncio.Future[Any]] = {main, self._failed}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not main.done():
                self._failed.result()
            return main.result()
        finally:
            await _end(main)
            await _end(*self._running)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)
            self._failed.exception()  # as seen: where nobody is left to guard, it has no consequence


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
