"""Signs of life: each process gives one every few seconds to whoever depends on it.

TCP and gRPC's keepalive answer for a process that is stopped; only the process itself can say that it goes on.
"""

from __future__ import annotations

import asyncio
import time

BEAT_SECONDS = 2.0
"""How often a process gives a sign of life."""
SILENT_SECONDS = 9.5
"""A process that gives none for this long is lost: whoever depends on it knows within ten."""


class Pulse:
    """How long another process has been silent. Belongs to one event loop."""

    def __init__(self) -> None:
        self._latest = time.monotonic()

    def beat(self) -> None:
        """Note a sign of life."""
        self._latest = time.monotonic()

    async def lost(self) -> None:
        """Return SILENT_SECONDS after the last sign of life.

        That is time in which this process ran: one that was stopped itself, as in a suspended job, judges nobody.
        """
        silent = 0.0
        while silent < SILENT_SECONDS:
            pause, latest = min(BEAT_SECONDS, SILENT_SECONDS - silent), self._latest
            await asyncio.sleep(pause)
            silent = silent + pause if self._latest == latest else min(pause, time.monotonic() - self._latest)
