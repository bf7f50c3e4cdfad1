"""One rank after the rendezvous: it keeps its engine process as the balancer orders, and leaves when told to.

The balancer forms the replicas; supervisors report and obey. A supervisor holds one stream to the balancer; if
that breaks (the balancer was restarted) the engine goes on, and the stream is opened again. Rank 0 also keeps the
balancer process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc.aio

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc._proto import mii_hpc_pb2_grpc as pb_grpc
from mii_hpc.deployments import credentials
from mii_hpc.deployments.files import tail
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.errors import DeploymentFailedError
from mii_hpc.job.net import LOOPBACK, host_answers, listening_socket, private_file
from mii_hpc.job.prepared_engine import Order, PreparedEngine
from mii_hpc.job.process import Child, ChildProcess
from mii_hpc.job.rendezvous import World
from mii_hpc.job.signals import DRAIN
from mii_hpc.job.tasks import Tasks
from mii_hpc.rpc import liveness, transport
from mii_hpc.rpc.liveness import Pulse

log = logging.getLogger(__name__)

START_SECONDS = 300.0
"""The balancer must be there within this time of a rank's start."""
BALANCER_DEADLINE_SECONDS = 40.0
"""Without a balancer for this long, later, a rank ends the job, unless the balancer serves others."""
HOST_DEADLINE_SECONDS = 1.0
"""It does after this where the balancer's host does not answer either: no process of it can be started again."""
REVIVE_SECONDS = 6.0
"""Without a balancer for this long, rank 0 is taken for lost."""
LEAVE_DEADLINE_SECONDS = 10.0
"""Told to end by a signal, a rank waits this long for the balancer's order to leave, then leaves without it."""
ENGINE_GRACE_SECONDS = 2.0
CRASHES = 5
"""A process that dies so often in a row is not started again: the deployment has failed."""
STEADY_SECONDS = 10.0
"""A process that has lived so long does not count as one that crashes."""
BALANCER_GRACE_SECONDS = 5.0


class AbandonedError(DeploymentFailedError):
    """The deployment cannot go on, and has no balancer to end it."""


async def supervise(
    run: RunDir,
    world: World,
    address: str,
    revive: Callable[[], None] = lambda: None,
    serves_others: Callable[[], bool] = lambda: False,
    prepared: PreparedEngine | None = None,
) -> None:
    """Keep a rank's processes until the balancer at `address` ("host:port") says that the deployment ends.

    `revive` is called while there is no balancer; it starts rank 0 again. `serves_others` tells whether there is one
    that only this rank does not reach. `prepared` is the rank's first engine process. Raises DeploymentFailedError when
    the deployment failed, AbandonedError when it has had no balancer for too long, or none that lives.
    """
    tasks = Tasks()
    supervisor = Supervisor(run, world, address, tasks, revive, serves_others, prepared)
    loop = asyncio.get_running_loop()
    for signum in DRAIN:
        loop.add_signal_handler(signum, supervisor.leave, signum.name)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    balancer = tasks.start(keep_balancer(run, world, address)) if world.role.rank == 0 else None
    if world.role.rank == 0 and run.load_config().gateway:
        tasks.start(keep_gateway(run, address.rpartition(":")[0]))

    async def live() -> str:
        failure = await supervisor.work()
        if balancer is not None:
            await asyncio.wait({balancer}, timeout=BALANCER_GRACE_SECONDS)  # until all ranks have left
        return failure

    failure = await tasks.guard(live())
    if failure:
        raise DeploymentFailedError(failure)


async def keep_balancer(run: RunDir, world: World, address: str) -> None:
    """Keep a balancer process on one port. See _keep()."""
    arguments = (str(run.path), address, "1" if world.spans_hosts else "0")
    await _keep("balancer", run.balancer_log, "mii_hpc.job.balancer", *arguments)


async def keep_gateway(run: RunDir, host: str) -> None:
    """Keep a gateway process at this host's address. See _keep()."""
    await _keep("gateway", run.gateway_log, "mii_hpc.gateway", str(run.path), host)


async def _keep(name: str, output: Path, module: str, *args: str) -> None:
    """Run a process of the deployment; when it dies, run another one. Returns when it ends well.

    Raises AbandonedError when it dies again and again, soon after its start.
    """
    crashes = 0
    while True:
        began = time.monotonic()
        process = await Child.start(module, *args, log=output)
        try:
            reason = await hear(process, lambda note: None)
        except asyncio.CancelledError:
            await process.end(1.0)
            raise
        if not reason:
            return
        crashes = crashes + 1 if time.monotonic() < began + STEADY_SECONDS else 1
        if crashes == CRASHES:
            words = tail(output).strip().rpartition("\n")[2]
            raise AbandonedError(f"the {name} {reason}, {CRASHES} times in a row: {words}")
        log.error("the %s %s; starting another", name, reason)
        await asyncio.sleep(0.2 * crashes)


async def hear(child: ChildProcess, on_note: Callable[[dict[str, Any]], None]) -> str:
    """Pass on what a child says until it has ended; return how it ended, "" when it ended well.

    One that has begun to give signs of life ("alive") and stops to is killed.
    """
    pulse, was_silent = Pulse(), asyncio.Event()
    silence: asyncio.Task[None] | None = None
    try:
        while (note := await child.next_note()) is not None:
            pulse.beat()
            if "alive" not in note:
                on_note(note)
            elif silence is None:
                silence = asyncio.create_task(_kill_when_silent(child, pulse, was_silent))
        status = await child.wait()
        if silence is not None and was_silent.is_set():
            await silence
            return f"gave no sign of life for {liveness.SILENT_SECONDS:.0f} s, and was killed"
        return _ended(status) if status else ""
    finally:
        if silence is not None:
            silence.cancel()


async def _kill_when_silent(child: ChildProcess, pulse: Pulse, was_silent: asyncio.Event) -> None:
    await pulse.lost()
    was_silent.set()
    log.error("process %d gives no sign of life", child.pid)
    await child.end(0.0)


class Supervisor:
    """Keeps the engine process of one rank. Belongs to the event loop that it is made in.

    `address` is the balancer's "host:port".
    """

    def __init__(
        self,
        run: RunDir,
        world: World,
        address: str,
        tasks: Tasks,
        revive: Callable[[], None] = lambda: None,
        serves_others: Callable[[], bool] = lambda: False,
        prepared: PreparedEngine | None = None,
    ) -> None:
        self.run, self.world, self.address, self.tasks = run, world, address, tasks
        self.revive, self.serves_others = revive, serves_others
        self.engine: ChildProcess | None = None
        self._prepared = prepared
        self._store: int | None = None
        """The file in which the engines of the replica meet: here, so that it is there before the leader's has it."""
        self.report = pb.RankReport(rank=world.role.rank, host=world.me.host)
        """What the balancer knows of the rank, or will in a moment."""
        self._changed = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self._leave_deadline = asyncio.timeout(None)

    async def work(self) -> str:
        """Do what the balancer orders until it orders to leave; then end the engine.

        Returns why the deployment failed, "" if it did not; and when no such order comes in time after leave().
        Raises AbandonedError when there is no balancer for too long.
        """
        try:
            async with self._leave_deadline:
                return await self._obey()
        except TimeoutError:
            log.warning("no order from the balancer %.0f s after the signal; leaving", LEAVE_DEADLINE_SECONDS)
            return ""
        finally:
            await self.stop_engine()

    def leave(self, signal_name: str) -> None:
        """Tell the balancer that this rank was told to end by a signal, which ends the whole deployment."""
        log.info("received %s: the deployment ends", signal_name)
        if not self.report.leaving:
            self._leave_deadline.reschedule(asyncio.get_running_loop().time() + LEAVE_DEADLINE_SECONDS)
            self._tell(leaving=True)

    async def start_engine(self, order: pb.StartEngine) -> None:
        """Start an engine process, in place of the one that runs, if any."""
        await self.stop_engine()
        role, listening = self.world.role, None
        store_address = order.store_address
        spans_hosts = self.world.replica_spans_hosts
        host = self.world.me.address if spans_hosts else LOOPBACK
        if role.leads and spans_hosts:
            listening = listening_socket(host)
            store_address = f"{host}:{listening.getsockname()[1]}"
        elif role.leads:
            self._store = private_file("store")
        spec = {
            "rank": role.replica_rank,
            "world_size": role.tensor_parallel,
            "local_rank": self.world.on_this_host.index(role.rank),
            "local_world_size": len(self.world.on_this_host),
            "replica_local_size": len(self.world.replica_on_this_host),
            "host": host,
            "store_address": store_address,
        }
        listen_host = self.world.me.address if self.world.spans_hosts else LOOPBACK
        try:
            store = self._store if listening is None else listening.fileno()
            self.engine = await self.spawn_engine(Order(spec, listen_host), store)
        finally:
            if listening is not None:
                listening.close()  # the engine has its own copy
        log.info("engine %d started, process %d", order.epoch, self.engine.pid)
        self._tell(
            engine=pb.STARTING,
            epoch=order.epoch,
            store_address=store_address or f"/proc/{os.getpid()}/fd/{self._store}",
            address="",
            detail="the engine starts",
            log="",
        )
        self._watch = self.tasks.start(self._watch_engine(self.engine))

    async def spawn_engine(self, order: Order, store: int | None) -> ChildProcess:
        """Have an engine process take an order and the descriptor of a store; return it."""
        prepared, self._prepared = self._prepared, None
        if prepared is None or not prepared.take(order, store):
            prepared = await PreparedEngine.start(self.run, self.world.role.rank)
            prepared.take(order, store)  # if it has ended by now, its end is reported as any other
        return prepared.child

    async def stop_engine(self) -> None:
        """End the engine process, if one runs."""
        if self._store is not None:
            os.close(self._store)
            self._store = None
        if self.engine is None:
            return
        if self._watch is not None:
            self._watch.cancel()  # an end that was ordered is no failure
        await self.engine.end(ENGINE_GRACE_SECONDS)
        self.engine = self._watch = None
        self._tell(engine=pb.DOWN, address="", detail="stopped")

    async def _obey(self) -> str:
        """Hold the stream to the balancer until it orders to leave; return why, "" when all is well."""
        keys = credentials.load_server(self.run).as_client
        last_heard, connected_once = time.monotonic(), False
        while True:
            async with transport.open_channel(self.address, keys) as channel:
                call = pb_grpc.MembershipStub(channel).Join(self._reports(), metadata=transport.authorization(keys))
                pulse = Pulse()
                silence = self.tasks.start(_cancel_when_silent(call, pulse))
                connected = False
                try:
                    await call.wait_for_connection()
                    connected = True
                    async for order in call:
                        pulse.beat()
                        match order.WhichOneof("order"):
                            case "leave":
                                return order.leave.failure
                            case "start":
                                await self.start_engine(order.start)
                            case "stop_engine":
                                await self.stop_engine()
                except grpc.aio.AioRpcError as error:
                    log.debug("the balancer does not answer: %s", error.details())
                except asyncio.CancelledError:
                    if transport.is_being_cancelled():
                        raise
                    log.warning("the balancer gives no sign of life")
                finally:
                    silence.cancel()
                if connected:
                    last_heard, connected_once = time.monotonic(), True
            away = time.monotonic() - last_heard
            patience = BALANCER_DEADLINE_SECONDS if connected_once else START_SECONDS
            if away > patience or (
                connected_once and away > HOST_DEADLINE_SECONDS and not await host_answers(self.address)
            ):
                if not await asyncio.to_thread(self.serves_others):
                    raise AbandonedError(f"rank {self.world.role.rank}: no balancer at {self.address} for {away:.0f} s")
            elif connected_once and away > REVIVE_SECONDS:
                await asyncio.to_thread(self.revive)
            await asyncio.sleep(0.2)

    async def _reports(self) -> AsyncIterator[pb.RankReport]:
        while True:
            self._changed.clear()
            copy = pb.RankReport()
            copy.CopyFrom(self.report)
            yield copy
            with contextlib.suppress(TimeoutError):  # at the latest then, as a sign of life
                await asyncio.wait_for(self._changed.wait(), liveness.BEAT_SECONDS)

    def _tell(self, **changes: object) -> None:
        for name, value in changes.items():
            setattr(self.report, name, value)
        self._changed.set()

    async def _watch_engine(self, engine: ChildProcess) -> None:
        """Report the engine process's notes, and its end at once."""
        failures = []

        def on_note(note: dict[str, Any]) -> None:
            if "ready" in note:
                self._tell(engine=pb.READY, address=note["ready"], detail="")
            elif "progress" in note:
                self._tell(detail=note["progress"])
            elif "failed" in note:
                failures.append(note["failed"])

        end = await hear(engine, on_note) or _ended(0)
        reason = failures[-1] if failures else f"the engine process {end}"
        log.warning("engine process %d has ended: %s", engine.pid, reason)
        log_tail = tail(self.run.engine_log(self.world.role.rank))
        self._tell(engine=pb.DOWN, address="", detail=reason, log=log_tail)


async def _cancel_when_silent(call: grpc.aio.StreamStreamCall[pb.RankReport, pb.RankOrder], pulse: Pulse) -> None:
    await pulse.lost()
    call.cancel()


def _ended(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
