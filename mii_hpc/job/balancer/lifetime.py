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
from mii_hpc.job.balancer.ending import Ending
from mii_hpc.job.balancer.membership import Membership
from mii_hpc.job.balancer.router import Router
from mii_hpc.job.balancer.succession import Succession
from mii_hpc.job.tasks import Tasks

log = logging.getLogger(__name__)

DRAIN_SECONDS = 3.0
"""How long running requests may go on when the deployment ends."""
LEAVE_SECONDS = 8.0
"""How long the ranks may take to leave."""
SETTLE_SECONDS = 3.0
"""How long the scheduler is given to say what a signal means."""


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
        succession: Succession,
        tasks: Tasks,
    ) -> None:
        self._run, self._config, self._progress, self._tasks = run, config, progress, tasks
        self._ending, self._membership, self._router, self._succession = ending, membership, router, succession
        self._registry = Registry(config.home)
        self._share = config.shared_group and Share(config.home, config.deployment_name, config.shared_group)
        self._entry: Entry | None = None
        self._ended = self._has_handed_over = False

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
        """Keep the entry until the end has begun; then drain, let the ranks leave, and see to the name.

        The next job has it then, if there is one to come. Where the job `is_requeued`, as is asked at its end, the
        entry says that it is pending again. Else it is withdrawn.
        """
        self._entry = entry
        keeping = self._tasks.start(self._keep_entry())
        watching = self._tasks.start(self._watch_deadlines())
        succeeding = self._tasks.start(self._succession.keep(self._ending, lambda: self._progress.startup))
        await self._ending.wait()
        self._membership.changed.set()
        if not self._ending.is_settled:
            await self._settle(is_requeued)
        if not self._ending.comes_back:
            await asyncio.to_thread(self._succession.end)  # first, so that none takes the name when it is free
        await self._drain()
        await self._membership.end(self._ending.failure, LEAVE_SECONDS)
        watching.cancel()
        # Not cancelled: a write that is under way on its thread must not come after the withdrawal.
        self._ended = True
        self._membership.changed.set()
        await keeping
        await asyncio.wait({succeeding}, timeout=SETTLE_SECONDS)
        for replica in self._router.live:
            await replica.close()
        await self._leave_name(is_requeued)

    async def _leave_name(self, is_requeued: Callable[[], bool]) -> None:
        assert self._entry is not None
        if self._has_handed_over:
            return
        if not self._succession.heir and not self._ending.failure and await asyncio.to_thread(is_requeued):
            pending = {"state": DeploymentState.PENDING, "address": "", "host": "", "detail": "its job was requeued"}
            with contextlib.suppress(DeploymentError):
                await asyncio.to_thread(self._publish, self._entry.model_copy(update=pending))
        elif self._ending.comes_back:
            await asyncio.to_thread(self._succession.leave)
        else:
            await asyncio.to_thread(self._succession.end)
            await asyncio.to_thread(free_name, self._config.home, self._entry)

    async def _settle(self, is_requeued: Callable[[], bool]) -> None:
        """Find out what becomes of the name after a signal."""
        comes_back = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                comes_back = await self._succession.expects(is_requeued)
        self._ending.settle(comes_back)

    async def _drain(self) -> None:
        """Let the requests that run end by themselves for a while, then cancel them."""
        began = time.monotonic()
        seconds = max(DRAIN_SECONDS, self._succession.seconds_left) if self._has_handed_over else DRAIN_SECONDS
        while any(replica.in_flight for replica in self._router.live) and time.monotonic() < began + seconds:
            if self._ending.hurries:
                seconds = DRAIN_SECONDS
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
            words = [f"{ready} of {len(replicas)} replicas ready", *waiting[:1], self._succession.detail]
            self._entry = self._entry.model_copy(
                update={
                    "state": self.state,
                    "heartbeat": time.time(),
                    "detail": "; ".join(filter(None, words)),
                    "successor": self._succession.next.job_id if self._succession.next else "",
                    "until": self._succession.until,
                    "gateway": self._run.read_gateway_url(),
                }
            )
            heir = self._succession.heir
            try:
                await asyncio.to_thread(self._remember, tuple(each.index for each in replicas if each.was_ready))
                if heir is not None and not self._ending.has_begun:
                    await asyncio.to_thread(self._succession.hand_over, heir)
                    self._has_handed_over = True
                    self._ending.begin(f"job {heir.job_id} has taken over", comes_back=True)
                    return
                await asyncio.to_thread(self._publish, self._entry)
            except DeploymentError as error:
                self._ending.begin(f"it has lost its name: {error}", comes_back=True)
                return
            except (OSError, RegistryError) as error:  # a full or absent filesystem must not end the deployment
                log.warning("the registry entry could not be written: %s", error)
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(self._run.beat)
            with contextlib.suppress(TimeoutError):
                is_quiet = not waiting and self._succession.is_quiet
                async with asyncio.timeout(HEARTBEAT_SECONDS if is_quiet else 0.5):
                    await changed.wait()

    def _remember(self, ready: tuple[int, ...]) -> None:
        if ready != self._progress.ready:
            progress = dataclasses.replace(self._progress, ready=ready)
            if self._membership.has_been_ready and progress.startup is None:
                progress = dataclasses.replace(progress, startup=time.time() - progress.started)
            self._run.write_progress(progress)
            self._progress = progress

    def _publish(self, entry: Entry) -> None:
        if not self._succession.has_name(entry):
            return
        self._registry.publish(entry)
        if self._share:
            self._share.publish(entry)
