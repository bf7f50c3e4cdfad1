"""A deployment that lives in the test's own process: what tests of clients, balancer and membership stand on."""

import asyncio
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, TypeVar

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.clients.asynchronous import AsyncMIIClient
from mii_hpc.config import MIIConfig, resolve
from mii_hpc.deployments import credentials
from mii_hpc.deployments.lookup import SharedHome
from mii_hpc.deployments.registry import Registry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.engine import create_engine
from mii_hpc.engine.base import EngineSpec
from mii_hpc.generation import Load
from mii_hpc.job import engine_process
from mii_hpc.job.balancer.balancer import Balancer
from mii_hpc.job.prepared_engine import Order
from mii_hpc.job.rendezvous import Member, World
from mii_hpc.job.supervisor import Supervisor
from mii_hpc.job.tasks import Tasks
from mii_hpc.placement import role_of
from mii_hpc.schedulers import Job
from mii_hpc.submission import submit as submission
from tests.waiting import PATIENCE, until

T = TypeVar("T")


class InProcessEngine:
    """An engine that runs in this process, and looks to a supervisor like the process that it usually is."""

    pid = os.getpid()

    def __init__(self, run: RunDir, order: Order) -> None:
        # Without the store: an engine of one rank needs none.
        config = run.load_config()
        self.spec = EngineSpec(model=config.model_conf, limits=config.limits, **order.spec)
        self.engine = create_engine(self.spec)
        self._run, self._listen_host = run, order.listen_host
        self._notes: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._serving: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._serving = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        loop, run = asyncio.get_running_loop(), self.engine.run

        def run_here() -> None:
            self._thread = threading.current_thread()
            run()

        def tell(**note: str) -> None:
            loop.call_soon_threadsafe(self._notes.put_nowait, note)

        self.engine.run = run_here  # type: ignore[method-assign]
        try:
            await engine_process.serve(self.engine, self._run, self._listen_host, self.spec.rank == 0, tell)
        except Exception as error:  # noqa: BLE001 (the process's boundary)
            self.die(f"{type(error).__name__}: {error}", 1)
        finally:
            self.engine.close()
            if self._thread is not None:
                await asyncio.to_thread(self._thread.join)

    async def next_note(self) -> dict[str, Any] | None:
        return await self._notes.get()

    async def wait(self) -> int:
        return await self._status

    async def end(self, grace: float) -> int:
        await self.break_connections()
        if not self._status.done():
            self._status.set_result(0)
        return await self.wait()

    def die(self, reason: str = "", status: int = -signal.SIGKILL) -> None:
        """Look like a process that was killed, or failed for a reason; the connections stay until the end."""
        if not self._status.done():
            if reason:
                self._notes.put_nowait({"failed": reason})
            self._notes.put_nowait(None)
            self._status.set_result(status)

    async def break_connections(self) -> None:
        """Break the connections and stop generating, without a word to the supervisor."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)


class Rank(Supervisor):
    """The supervisor of a rank on a host of its own, whose engines run in this process."""

    engine: InProcessEngine

    def __init__(self, number: int, run: RunDir, config: MIIConfig, address: str) -> None:
        model = config.model_conf
        members = tuple(Member(rank, f"node{rank}", "127.0.0.1") for rank in range(model.world_size))
        super().__init__(run, World(role_of(number, model.tensor_parallel), members), address, Tasks())
        self.epochs: list[int] = []
        """The epoch of each engine that it was ordered to start."""
        self.comes_back = True
        """Whether the engines that it starts come up."""
        self.left: str | None = None
        """Once it has been told to leave: why."""

    async def live(self) -> None:
        self.left = await self.tasks.guard(self.work())

    async def start_engine(self, order: pb.StartEngine) -> None:
        self.epochs.append(order.epoch)
        await super().start_engine(order)

    async def spawn_engine(self, order: Order, store: int | None) -> InProcessEngine:
        engine = InProcessEngine(self.run, order)
        if self.comes_back:
            engine.start()
        return engine


class Deployment:
    """A deployment in this event loop: a real balancer with TLS and registry entry, and a Rank for each rank.

    Without a model, its engines are echo engines.

    Its job, to whoever asks, is a process that waits for its standard input to close. `own_job` is what the balancer
    knows of it.
    """

    own_job: Job | None = None

    def __init__(
        self,
        home: Path,
        *,
        model: str = "",
        name: str = "chat",
        tensor_parallel: int = 1,
        replica_num: int = 2,
        max_length: int | None = None,
        chat_template: str | None = None,
        migration_limit: int = 3,
        hold_seconds: float = PATIENCE,
        share: str | None = None,
        limits: dict[str, Any] | None = None,
        **engine: Any,
    ) -> None:
        self.config = resolve(
            model,
            deployment_name=name,
            tensor_parallel=tensor_parallel,
            replica_num=replica_num,
            max_length=max_length,
            chat_template=chat_template,
            migration_limit=migration_limit,
            hold_seconds=hold_seconds,
            share=share,
            limits=limits or {},
            inference_engine_config={"engine": "deepspeed" if model else "echo", **engine},
            home=home,
            cluster="local",
        )
        self.run, self.entry = submission.prepare(self.config)
        self.keys = credentials.load_server(self.run)
        self.registry = Registry(self.config.home)
        self.job = subprocess.Popen(["sh", "-c", "read _", "job", str(self.run.path)], stdin=subprocess.PIPE)
        self.ranks: list[Rank] = []
        self.tasks: list[asyncio.Task[None]] = []
        self._clients: list[AsyncMIIClient] = []
        self.address = ""

    async def start(self) -> Self:
        """Return when all replicas are ready."""
        self.address = await self.start_balancer()
        self.start_ranks()
        await until(lambda: self.state() == "ready")
        return self

    async def start_balancer(self, is_requeued: Callable[[], bool] = lambda: False) -> str:
        self.balancer = Balancer(self.run, self.config, self.keys, self.run.begin(0), self.own_job)
        address = f"127.0.0.1:{await self.balancer.listen('127.0.0.1:0')}"
        self.entry = self.entry.model_copy(
            update={
                "job_id": str(self.job.pid),
                "job_host": socket.gethostname(),
                "state": "loading",
                "host": "node0",
                "address": address,
            }
        )
        self.working = asyncio.create_task(self.balancer.serve(self.entry, is_requeued))
        return address

    async def kill_balancer(self) -> None:
        """Break all connections to the balancer, and leave its registry entry."""
        await self.balancer.server.stop(None)
        self.working.cancel()
        await asyncio.wait({self.working})

    async def replace_balancer(self) -> None:
        """Start another balancer, at another port, that the ranks find."""
        self.address = await self.start_balancer()
        for rank in self.ranks:
            rank.address = self.address

    def start_ranks(self) -> None:
        self.ranks = [
            Rank(number, self.run, self.config, self.address) for number in range(self.config.model_conf.world_size)
        ]
        self.tasks = [asyncio.create_task(rank.live()) for rank in self.ranks]

    def state(self) -> str | None:
        entry = self.registry.get(self.config.deployment_name)
        return entry.state if entry else None

    def client(self) -> AsyncMIIClient:
        """Return a new client, which is closed with the deployment."""
        self._clients.append(AsyncMIIClient(self.config))
        return self._clients[-1]

    def guest(self) -> AsyncMIIClient:
        """Return a new client as one of the group has it, with which this deployment is shared."""
        self._clients.append(AsyncMIIClient(self.config, home=SharedHome(self.config.home)))
        return self._clients[-1]

    def stats(self) -> list[Load]:
        """Return the load of every replica."""
        return [rank.engine.engine.stats() for rank in self.ranks if rank.world.role.leads]

    def is_idle(self) -> bool:
        """Whether no engine has anything in hand."""
        return all(stats.running == stats.waiting == 0 for stats in self.stats())

    async def stop(self) -> None:
        """End it and everything around it. Nothing happens the second time."""
        for client in self._clients:
            await client.close()
        await self.stop_balancer()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.end_job()

    async def stop_balancer(self) -> None:
        self.balancer.ending.begin("the test is over")
        await asyncio.wait({self.working})

    def end_job(self) -> None:
        assert self.job.stdin is not None
        self.job.stdin.close()
        self.job.wait(PATIENCE)


class InThread:
    """A deployment in an event loop on a thread of its own, for tests that block."""

    def __init__(self, home: Path, **shape: Any) -> None:
        started: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        self._loop = started.result(PATIENCE)
        self.deployment = Deployment(home, **shape)
        self.config = self.deployment.config
        self.do(self.deployment.start())

    @staticmethod
    def _run(started: "Future[asyncio.AbstractEventLoop]") -> None:
        with asyncio.Runner() as runner:  # at its end no task is left, to be told of in some later test
            started.set_result(runner.get_loop())
            runner.get_loop().run_forever()

    def do(self, awaitable: Coroutine[Any, Any, T]) -> T:
        """Run something in the deployment's event loop."""
        return asyncio.run_coroutine_threadsafe(awaitable, self._loop).result(2 * PATIENCE)

    def until(self, condition: Callable[[], T]) -> T:
        return self.do(until(condition))

    def stop(self) -> None:
        self.do(self.deployment.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
