"""Whether a deployment ends, and what becomes of its name."""

from __future__ import annotations

import asyncio
import logging

from mii_hpc.deployments.rundir import Failure, RunDir
from mii_hpc.job.balancer.membership import EngineDeath

log = logging.getLogger(__name__)


class Ending:
    """Whether the deployment ends in this job, and why. The first reason counts.

    Attributes:
        reason: why it ends.
        failure: why it has failed; empty when it ends well.
        comes_back: whether its name is served again, by the next job or by this one when it starts again; known once
            settled() has returned.
        hurries: whether it was told to end again while it ended.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._begun, self._settled = asyncio.Event(), asyncio.Event()
        self.reason = self.failure = ""
        self.comes_back = self.hurries = False

    @property
    def has_begun(self) -> bool:
        """Whether the deployment ends: no request is admitted any more."""
        return self._begun.is_set()

    @property
    def is_settled(self) -> bool:
        """Whether it is known if the name comes back."""
        return self._settled.is_set()

    async def wait(self) -> None:
        """Return when the end has begun."""
        await self._begun.wait()

    async def settled(self) -> None:
        """Return when the end has begun, and it is known whether the name comes back."""
        await self._settled.wait()

    def begin(self, reason: str, comes_back: bool | None = False) -> None:
        """Begin to end the deployment, which has not failed; `comes_back` is None where settle() is to follow."""
        if self.has_begun:
            self.hurries = True
            return
        log.info("the deployment ends: %s", reason)
        self.reason = reason
        self._begun.set()
        if comes_back is not None:
            self.settle(comes_back)

    def settle(self, comes_back: bool) -> None:
        """Say whether the name comes back."""
        self.comes_back = comes_back
        self._settled.set()

    def fail(self, failure: Failure) -> None:
        """Begin to end the deployment, because it has failed; write it to the run directory."""
        if not self.has_begun:
            self.failure = failure.message
            self._run.write_failure(failure)
            self.begin(failure.message)

    def on_signal(self, reason: str) -> None:
        """Begin to end the deployment, because a process of its job was told to end."""
        self.begin(reason, comes_back=None)

    def on_death(self, death: EngineDeath) -> None:
        """Fail when an engine has died whose replica was never ready: it will die again."""
        report = death.report
        message = f"rank {report.rank} (replica {death.replica}, host {report.host}): {report.detail}"
        log.error("%s", message)
        if not death.replica_was_ready:
            self.fail(Failure(report.rank, report.host, message, report.log))
