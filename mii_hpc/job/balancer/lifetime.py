"""The life of a deployment in its balancer: the registry entry, the deadlines, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import time
from collections.abc import Callable

from mii_hpc.config import MIIConfig
from mii_hpc.deployments.lookup import free_name
from mii_hpc.deployments.registry import HEARTBEAT_SECONDS, Entry, Registry
from mii_hpc.deployments.rundir import Failure, Progress, RunDir
from mii_hpc.deployments.sharing import Share
from mii_hpc.deployments.state import DeploymentState
from mii_hpc.errors import DeploymentError, RegistryError
from mii_hpc.heap import trim_heap
from mii_hpc.job.balancer.membership import EngineDeath, Membership
from mii_hpc.job.balancer.router import Router
from mii_hpc.job.tasks import Tasks

log = logging.getLogger(__name__)

DRAIN_SECONDS = 3.0
"""How long running requests may go on when the deployment ends."""
LEAVE_SECONDS = 8.0
"""How long the ranks may take to leave."""


class Ending:
    """Whether the deployment ends, and why. The first reason counts."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._begun = asyncio.Event()
        self.reason = ""
        self.failure = ""
        """Why the deployment has failed; empty when it ends well."""

    @property
    def has_begun(self) -> bool:
        """Whether the deployment ends: no request is admitted any more."""
        return self._begun.is_set()

    async def wait(self) -> None:
        """Return when the end has begun."""
        await self._begun.wait()

    def begin(self, reason: str) -> None:
        """Begin to end the deployment, which has not failed."""
        if not self.has_begun:
            log.info("the deployment ends: %s", reason)
            self.reason = reason
            self._begun.set()

    def fail(self, failure: Failure) -> None:
        """Begin to end the deployment, because it has failed; write it to the run directory."""
        if not self.has_begun:
            self.failure = failure.message
            self._run.write_failure(failure)
            self.begin(failure.message)

    def on_death(self, death: EngineDeath) -> None:
        """Fail when an engine has died whose replica was never ready: it will die again."""
        report = death.report
        message = f"rank {report.rank} (replica {death.replica}, host {report.host}): {report.detail}"
        log.error("%s", message)
        if not death.replica_was_ready:
            self.fail(Failure(report.rank, report.host, message, report.log))


class Lifetime:
    """Keeps a deployment and its registry entry from its start to its end."""

    def __init__(
        self,
        run: RunDir,
        config: MIIConfig,
        progress: Progress,
        ending: Ending,
        membership: Membership,
        router: Router,
        tasks: Tasks,
    ) -> None:
        self._run, self._config, self._progress, self._tasks = run, config, progress, tasks
        self._ending, self._membership, self._router = ending, membership, router
        self._registry = Registry(config.home)
        self._share = config.shared_group and Share(config.home, config.deployment_name, config.shared_group)
        self._entry: Entry | None = None
        self._ended = False

    @property
    def state(self) -> DeploymentState:
        """The deployment's state."""
        if self._ending.has_begun:
            return DeploymentState.STOPPING
        if not self._membership.has_been_ready:
            return DeploymentState.LOADING
        return DeploymentState.READY if self._membership.are_ready else DeploymentState.DEGRADED

    @property
    def job_id(self) -> str:
        """The scheduler's id of the job; "" before run()."""
        return self._entry.job_id if self._entry else ""

    async def run(self, entry: Entry, is_requeued: Callable[[], bool] = lambda: False) -> None:
        """Keep the entry until the end has begun; then drain, let the ranks leave, and withdraw the entry.

        Where the job `is_requeued`, as is asked at its end, the entry says that it is pending again.
        """
        self._entry = entry
        keeping = self._tasks.start(self._keep_entry())
        watching = self._tasks.start(self._watch_deadlines())
        await self._ending.wait()
        self._membership.changed.set()
        await self._drain()
        await self._membership.end(self._ending.failure, LEAVE_SECONDS)
        watching.cancel()
        # Not cancelled: a write that is under way on its thread must not come after the withdrawal.
        self._ended = True
        self._membership.changed.set()
        await keeping
        for replica in self._router.live:
            await replica.close()
        if not self._ending.failure and await asyncio.to_thread(is_requeued):
            pending = {"state": DeploymentState.PENDING, "address": "", "host": "", "detail": "its job was requeued"}
            with contextlib.suppress(DeploymentError):
                await asyncio.to_thread(self._publish, self._entry.model_copy(update=pending))
        else:
            await asyncio.to_thread(free_name, self._config.home, self._entry)

    async def _drain(self) -> None:
        """Let the requests that run end by themselves for a while, then cancel them."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while any(replica.in_flight for replica in self._router.live) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for replica in self._router.live:
            replica.cancel_requests()

    async def _watch_deadlines(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            trim_heap()
            timeout = self._config.startup_timeout
            if not self._membership.has_been_ready and time.time() > self._progress.started + timeout:
                details = "; ".join(
                    f"replica {replica.index}: {replica.detail}"
                    for replica in self._membership.replicas
                    if replica.state != "ready"
                )
                message = f"not ready after startup_timeout={timeout:.0f} s: {details}"
                self._ending.fail(Failure(-1, socket.gethostname(), message, ""))
            self._membership.expire(timeout)

    async def _keep_entry(self) -> None:
        """Publish the entry at every change, and otherwise as a heartbeat."""
        changed = self._membership.changed
        while not self._ended:
            assert self._entry is not None
            changed.clear()
            replicas = self._membership.replicas
            waiting = [replica.detail for replica in replicas if replica.state != "ready" and replica.detail]
            ready = sum(replica.state == "ready" for replica in replicas)
            detail = f"{ready} of {len(replicas)} replicas ready" + (f"; {waiting[0]}" if waiting else "")
            self._entry = self._entry.model_copy(
                update={
                    "state": self.state,
                    "heartbeat": time.time(),
                    "detail": detail,
                    "gateway": self._run.read_gateway_url(),
                }
            )
            try:
                await asyncio.to_thread(self._remember, tuple(each.index for each in replicas if each.was_ready))
                await asyncio.to_thread(self._publish, self._entry)
            except DeploymentError as error:
                self._ending.begin(f"it has lost its name: {error}")
                return
            except (OSError, RegistryError) as error:  # a full or absent filesystem must not end the deployment
                log.warning("the registry entry could not be written: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS if not waiting else 0.5):
                    await changed.wait()

    def _remember(self, ready: tuple[int, ...]) -> None:
        if ready != self._progress.ready:
            progress = dataclasses.replace(self._progress, ready=ready)
            self._run.write_progress(progress)
            self._progress = progress

    def _publish(self, entry: Entry) -> None:
        self._registry.publish(entry)
        if self._share:
            self._share.publish(entry)
