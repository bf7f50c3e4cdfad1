"""How fast the long requests of guests go through the balancer."""

from __future__ import annotations

import asyncio
import time

from mii_hpc.errors import QueueFullError

LONG_BYTES = 2**16
"""A shorter request waits for none."""
BYTES_PER_SECOND = 2**21
"""To decode a message takes the balancer, and then an engine, up to 0.2 us for each of its bytes, in which they do
nothing else; what can be as long as that has to wait in turn."""


class Pace:
    """The pace of all long requests of guests together, of which `most` bytes may wait. Belongs to one event loop.

    Attributes:
        waiting: how many bytes of them wait.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.waiting = 0
        self._turn = asyncio.Lock()
        self._free_at = 0.0

    async def keep(self, size: int) -> None:
        """Wait until a request of so many bytes may go on. Raises QueueFullError when too many bytes wait before it."""
        if size < LONG_BYTES:
            return
        if self.waiting and self.waiting + size > self._most:
            what = f"{self.waiting} bytes of long requests are waiting, {size} are to come"
            raise QueueFullError(f"{what}, and limits.guest_waiting_bytes={self._most} are allowed; try again later")
        self.waiting += size
        try:
            async with self._turn:
                await asyncio.sleep(self._free_at - time.monotonic())
                self._free_at = time.monotonic() + size / BYTES_PER_SECOND
        finally:
            self.waiting -= size
