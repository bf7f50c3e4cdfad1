"""One rank after the rendezvous: it keeps its engine process as the balancer orders, and ends when told to.

The balancer forms the replicas; supervisors report and obey. A supervisor holds one stream to the balancer; if
that breaks (the balancer was restarted) the engine goes on, and the stream is opened anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc.aio

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.deployments import credentials
from mii_hpc.deployments.files import tail
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.errors import DeploymentFailedError
from mii_hpc.job.net import LOOPBACK, listening_socket
from mii_hpc.job.process import Child
from mii_hpc.job.rendezvous import World
from mii_hpc.rpc import transport, wire

log = logging.getLogger(__name__)

BALANCER_DEADLINE_SECONDS = 60.0
"""Without a balancer for this long a rank gives up."""
LEAVE_DEADLINE_SECONDS = 10.0
"""Told to end by a signal, a rank waits this long for the balancer's leave before it goes without."""
ENGINE_GRACE_SECONDS = 2.0
BALANCER_GRACE_SECONDS = 5.0


async def supervise(run: RunDir, world: World, address: str) -> None:
    """Keep a rank's processes until the balancer at `address` ("host:port") says that the deployment ends.

    Raises DeploymentFailedError when the deployment failed, or has had no balancer for too long.
    """
    await Supervisor(run, world, address).work()


@dataclass
class Supervisor:
    """The supervisor of one rank. Made inside the event loop that it belongs to."""

    run: RunDir
    world: World
    address: str
    """"host:port" of the balancer."""

    _report: pb.RankReport = field(default_factory=pb.RankReport)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _engine: Child | None = None
    _watch: asyncio.Task[None] | None = None
    _balancer: asyncio.Task[None] | None = None
    _patience: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))

    async def work(self) -> None:
        """See supervise()."""
        self._report = pb.RankReport(rank=self.world.role.rank, host=self.world.me.host)
        loop = asyncio.get_running_loop()
        # SIGUSR2 is what Slurm sends ahead of the walltime, by submitit's --signal.
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            loop.add_signal_handler(signum, self._leave_on, signum)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        if self.world.role.rank == 0:
            self._balancer = asyncio.create_task(self._keep_balancer())
        failure = ""
        try:
            async with self._patience:
                failure = await self._attend()
        except TimeoutError:
            log.warning("no leave from the balancer %.0f s after the signal; going", LEAVE_DEADLINE_SECONDS)
        finally:
            await self._stop_engine()
            if self._balancer is not None:
                await self._end_balancer(self._balancer)
        if failure:
            raise DeploymentFailedError(failure)

    async def _attend(self) -> str:
        """Hold the stream to the balancer until it says leave; return why, "" when all is well."""
        keys = credentials.load_server(self.run).as_client
        last_heard = time.monotonic()
        while True:
            async with transport.open_channel(self.address, keys) as channel:
                call = channel.stream_stream(
                    wire.ATTEND.path,
                    request_serializer=pb.RankReport.SerializeToString,
                    response_deserializer=pb.RankOrder.FromString,
                )(self._reports(), metadata=transport.authorization(keys))
                connected = False
                try:
                    await call.wait_for_connection()
                    connected = True
                    async for order in call:
                        match order.WhichOneof("order"):
                            case "leave":
                                return str(order.leave.failure)
                            case "start":
                                await self._start_engine(order.start)
                            case "stop_engine":
                                await self._stop_engine()
                except grpc.aio.AioRpcError as error:
                    log.debug("the balancer is away: %s", error.details())
                if connected:
                    last_heard = time.monotonic()
            if time.monotonic() > last_heard + BALANCER_DEADLINE_SECONDS:
                return (
                    f"rank {self.world.role.rank}: no balancer at {self.address} for {BALANCER_DEADLINE_SECONDS:.0f} s"
                )
            await asyncio.sleep(0.2)

    async def _reports(self) -> AsyncIterator[pb.RankReport]:
        while True:
            self._changed.clear()
            copy = pb.RankReport()
            copy.CopyFrom(self._report)
            yield copy
            await self._changed.wait()

    def _tell(self, **changes: object) -> None:
        for name, value in changes.items():
            setattr(self._report, name, value)
        self._changed.set()

    def _leave_on(self, signum: signal.Signals) -> None:
        log.info("received %s: the deployment ends", signal.Signals(signum).name)
        if not self._report.leaving:
            self._patience.reschedule(asyncio.get_running_loop().time() + LEAVE_DEADLINE_SECONDS)
            self._tell(leaving=True)

    async def _start_engine(self, order: pb.StartEngine) -> None:
        await self._stop_engine()
        role, store = self.world.role, None
        store_address = order.store_address
        host = self.world.me.address if self.world.replica_spans_hosts else LOOPBACK
        if role.leads:
            store = listening_socket(host)
            store_address = f"{host}:{store.getsockname()[1]}"
        try:
            self._engine = await self._spawn_engine(host, store_address, store)
        finally:
            if store is not None:
                store.close()  # the child has its own copy
        log.info("engine %d started, process %d", order.epoch, self._engine.process.pid)
        self._tell(
            engine=pb.STARTING,
            epoch=order.epoch,
            store_address=store_address,
            address="",
            detail="the engine starts",
            log="",
        )
        self._watch = asyncio.create_task(self._watch_engine(self._engine))

    async def _spawn_engine(self, host: str, store_address: str, store: socket.socket | None) -> Child:
        role = self.world.role
        place = {
            "rank": role.replica_rank,
            "world_size": role.tensor_parallel,
            "local_rank": self.world.on_this_host.index(role.rank),
            "local_world_size": len(self.world.on_this_host),
            "replica_local_size": len(self.world.replica_on_this_host),
            "host": host,
            "store_address": store_address,
            "store_fd": store.fileno() if store is not None else None,
        }
        listen_host = self.world.me.address if self.world.spans_hosts else LOOPBACK
        return await Child.start(
            "mii_hpc.job.replica",
            str(self.run.path),
            json.dumps(place),
            listen_host,
            log=self.run.engine_log(role.rank),
            pass_fds=() if store is None else (store.fileno(),),
        )

    async def _watch_engine(self, engine: Child) -> None:
        """Pass on what the engine process says, and notice its end at once."""
        reason = ""
        while (note := await engine.next_note()) is not None:
            if "ready" in note:
                self._tell(engine=pb.READY, address=note["ready"], detail="")
            elif "progress" in note:
                self._tell(detail=note["progress"])
            elif "failed" in note:
                reason = note["failed"]
        status = await engine.process.wait()
        reason = reason or f"the engine process {_ended(status)}"
        log.warning("engine process %d is gone: %s", engine.process.pid, reason)
        words = tail(self.run.engine_log(self.world.role.rank))
        self._tell(engine=pb.DOWN, address="", detail=reason, log=words)

    async def _stop_engine(self) -> None:
        if self._engine is None:
            return
        if self._watch is not None:
            self._watch.cancel()  # an end that was ordered is no failure
        await self._engine.end(ENGINE_GRACE_SECONDS)
        self._engine = self._watch = None
        self._tell(engine=pb.DOWN, address="", detail="stopped")

    async def _keep_balancer(self) -> None:
        """Run the balancer process; when it dies, run another one on the same port."""
        while True:
            balancer = await Child.start(
                "mii_hpc.job.balancer",
                str(self.run.path),
                self.address,
                "1" if self.world.spans_hosts else "0",
                log=self.run.balancer_log,
            )
            try:
                status = await balancer.process.wait()
            except asyncio.CancelledError:
                await balancer.end(1.0)
                raise
            if status == 0:
                return
            log.error("the balancer %s; starting another", _ended(status))
            await asyncio.sleep(0.2)

    async def _end_balancer(self, keeping: asyncio.Task[None]) -> None:
        """Give the balancer time to see all ranks off."""
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(keeping, BALANCER_GRACE_SECONDS)


def _ended(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
