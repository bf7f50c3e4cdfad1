"""Which replica a request goes to: strict round robin."""

from __future__ import annotations

import asyncio

from mii_hpc.errors import UnavailableError
from mii_hpc.job.balancer.connection import ReplicaConnection
from mii_hpc.rpc import wire

BATCHES_REMEMBERED = 4096
"""Calls with several prompts whose turns are kept in mind."""


class Router:
    """Strict round robin over the live replicas. Belongs to one event loop, where no two requests interleave."""

    def __init__(self) -> None:
        self._by_index: dict[int, ReplicaConnection] = {}
        self.live: tuple[ReplicaConnection, ...] = ()
        """The live replicas, by index."""
        self._count = 0
        self._batches: dict[str, int] = {}
        """For each of the latest calls with several prompts: the turn of its first one."""
        self.served: dict[int, int] = {}
        """How many requests each replica was given, by index."""
        self._arrival = asyncio.Event()

    def add(self, replica: ReplicaConnection) -> None:
        """Let a replica take requests from now on."""
        self._by_index[replica.index] = replica
        self._sort()
        self._arrival.set()

    def remove(self, index: int) -> ReplicaConnection | None:
        """Let a replica take no more requests, and return it; None when it took none before."""
        removed = self._by_index.pop(index, None)
        self._sort()
        return removed

    def next(self, position: wire.BatchPosition | None = None) -> ReplicaConnection:
        """Return the replica for the next request, or for the one at that position of a batch.

        The prompts of a batch take consecutive turns, in whatever order they arrive. Raises UnavailableError when
        no replica is live.
        """
        choices = self._choices()
        return self._give(choices[self._turn(position) % len(choices)])

    def idlest(self) -> ReplicaConnection:
        """Return the replica with the fewest requests in flight, for one that had its turn before.

        Raises UnavailableError when no replica is live.
        """
        return self._give(self.any())

    def any(self) -> ReplicaConnection:
        """Return the idlest replica, for what is no request. Raises UnavailableError when none is live."""
        return min(self._choices(), key=lambda replica: replica.in_flight)

    async def wait(self) -> None:
        """Return when a replica is live; those that wait go on in the order in which they came."""
        while not self.live:
            self._arrival.clear()
            await self._arrival.wait()

    def _sort(self) -> None:
        self.live = tuple(self._by_index[index] for index in sorted(self._by_index))

    def _choices(self) -> tuple[ReplicaConnection, ...]:
        if not self.live:
            raise UnavailableError("no replica of the deployment is able to serve at the moment")
        return self.live

    def _give(self, replica: ReplicaConnection) -> ReplicaConnection:
        self.served[replica.index] = self.served.get(replica.index, 0) + 1
        return replica

    def _turn(self, position: wire.BatchPosition | None) -> int:
        if position is not None and position.batch in self._batches:
            return self._batches[position.batch] + position.index
        first = self._count
        self._count += 1 if position is None else position.size
        if position is None:
            return first
        self._batches[position.batch] = first
        if len(self._batches) > BATCHES_REMEMBERED:
            del self._batches[next(iter(self._batches))]
        return first + position.index
