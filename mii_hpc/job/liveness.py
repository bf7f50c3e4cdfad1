"""Signs of life: each process gives one every few seconds to whoever depends on it.

TCP and gRPC's keepalive answer for a process that is stopped; only the process itself can say that it goes on.
"""

from __future__ import annotations

import asyncio

BEAT_SECONDS = 2.0
"""How often a process gives a sign of life."""
SILENT_SECONDS = 10.0
"""A process that gives none for this long is lost."""


class Pulse:
    """How long another process has been silent. Belongs to one event loop."""

    def __init__(self) -> None:
        self._waits = 0

    def beat(self) -> None:
        """Note a sign of life."""
        self._waits = 0

    async def lost(self) -> None:
        """Return when there was no sign of life for SILENT_SECONDS.

        That is time in which this process ran: one that was stopped itself, as in a suspended job, judges nobody.
        """
        while self._waits * BEAT_SECONDS < SILENT_SECONDS:
            self._waits += 1
            await asyncio.sleep(BEAT_SECONDS)
