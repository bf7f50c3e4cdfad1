"""Ranks that are lost are started again, where their node lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from mii_hpc.job.balancer.ending import Ending
from mii_hpc.job.balancer.membership import Membership
from mii_hpc.job.tasks import Tasks

log = logging.getLogger(__name__)

REPLACE_SECONDS = (5.0, 10.0, 30.0, 60.0)
"""How long a rank may be away before it is started again, and then before each further attempt; the last repeats."""


class Replacements:
    """Starts ranks again.

    `start` is given a rank and its node. It does nothing where the old one still lives, and returns False when the job
    has lost the node: the rank is not asked for again then.
    """

    def __init__(self, membership: Membership, ending: Ending, tasks: Tasks, start: Callable[[int, str], bool]) -> None:
        self._membership, self._ending, self._tasks, self._start = membership, ending, tasks, start
        self._missing: set[int] = set()

    def lose(self, rank: int, node: str) -> None:
        """Start a rank again, unless it comes back by itself."""
        if rank not in self._missing:
            self._missing.add(rank)
            self._tasks.start(self._replace(rank, node))

    async def _replace(self, rank: int, node: str) -> None:
        attempt = 0
        try:
            while True:
                await asyncio.sleep(REPLACE_SECONDS[min(attempt, len(REPLACE_SECONDS) - 1)])
                if rank in self._membership.members or self._ending.has_begun:
                    return
                log.warning("rank %d is lost: starting it again on %s", rank, node)
                if not await asyncio.to_thread(self._start, rank, node):
                    log.warning("rank %d is lost for good: the job has lost %s", rank, node)
                    self._membership.give_up(rank, f"the job has lost node {node}, and rank {rank} with it")
                    return
                attempt += 1
        finally:
            self._missing.discard(rank)
