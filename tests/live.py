"""A deployment that lives in the test's own process: what tests of clients, balancer and membership stand on."""

import asyncio
import contextlib
import subprocess
import threading
import time

import grpc.aio

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.clients.asynchronous import AsyncMIIClient
from mii_hpc.config import resolve
from mii_hpc.deployments import credentials
from mii_hpc.deployments.registry import Registry
from mii_hpc.engine.base import EngineSpec, create_engine
from mii_hpc.job.balancer import Balancer
from mii_hpc.job.replica import InferenceService
from mii_hpc.placement import role_of
from mii_hpc.rpc import transport, wire
from mii_hpc.submission import submit as submission
from tests.waiting import PATIENCE


async def until(condition, seconds=PATIENCE):
    """Return what `condition` gives once it is true; fail when it is not in time."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not in {seconds} s: {condition}"
        await asyncio.sleep(0.005)
    return result


class Rank:
    """A rank as the balancer and the clients know it: it attends, and its engine runs in this process."""

    def __init__(self, number, config, address, keys):
        self.role = role_of(number, config.model_conf.tensor_parallel)
        self.engine = None
        self.epochs = []
        """The epoch of each engine that it was ordered to start."""
        self.comes_back = True
        """Whether it obeys orders to start an engine."""
        self.left = None
        """Once it has been told to leave: why."""
        self._model, self._address, self._keys = config.model_conf, address, keys
        self._report = pb.RankReport(rank=number, host=f"node{number}")
        self._changed = asyncio.Event()
        self._server = self._thread = None

    async def live(self):
        """Attend, also at a balancer that takes the place of another, and obey, until told to leave."""
        while self.left is None:
            async with transport.open_channel(self._address, self._keys.as_client) as channel:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await self._obey(channel)
            await asyncio.sleep(0.02)

    async def _obey(self, channel):
        attend = channel.stream_stream(
            wire.ATTEND.path,
            request_serializer=pb.RankReport.SerializeToString,
            response_deserializer=pb.RankOrder.FromString,
        )
        async for order in attend(self._reports(), metadata=transport.authorization(self._keys.as_client)):
            match order.WhichOneof("order"):
                case "start":
                    await self._start(order.start)
                case "stop_engine":
                    await self.stop_engine()
                    self.tell(engine=pb.DOWN, address="", detail="stopped")
                case "leave":
                    self.left = order.leave.failure
                    return

    async def _reports(self):
        while True:
            self._changed.clear()
            copy = pb.RankReport()
            copy.CopyFrom(self._report)
            yield copy
            await self._changed.wait()

    def tell(self, **changes):
        for name, value in changes.items():
            setattr(self._report, name, value)
        self._changed.set()

    async def _start(self, order):
        await self.stop_engine()
        self.epochs.append(order.epoch)
        if not self.comes_back:
            return
        self.tell(engine=pb.STARTING, epoch=order.epoch, store_address="store:1", address="")
        spec = EngineSpec(self._model, self.role.replica_rank, self.role.tensor_parallel, 0, 1, 1, "", "")
        self.engine = create_engine(spec)
        await asyncio.to_thread(self.engine.load, lambda _sentence: None)
        self._thread = threading.Thread(target=self.engine.run, daemon=True)
        self._thread.start()
        address = ""
        if self.role.leads:
            services = {wire.GENERATE.service: InferenceService(self.engine).handlers()}
            self._server = transport.create_server(
                services, lambda _method, token: transport.same_token(token, self._keys.rank_token)
            )
            address = f"127.0.0.1:{transport.listen(self._server, '127.0.0.1:0', self._keys)}"
            await self._server.start()
        self.tell(engine=pb.READY, address=address, detail="")

    async def stop_engine(self):
        """Break the engine's connections and end it, without a word to the balancer."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)
        if self._thread is not None:
            self.engine.close()
            await asyncio.to_thread(self._thread.join)

    def report_death(self):
        """Say what a supervisor says as soon as its engine process is gone."""
        self.tell(engine=pb.DOWN, address="", detail="the engine process was killed by SIGKILL")


class Deployment:
    """A deployment in this event loop: a real balancer with TLS and registry entry, and a Rank for each rank.

    Without a model, its engines are echo engines.

    Its job, to whoever asks, is a process that waits for its standard input to close.
    """

    def __init__(self, home, *, model="", name="chat", tensor_parallel=1, replica_num=2, max_length=None, **engine):
        self.config = resolve(
            model,
            deployment_name=name,
            tensor_parallel=tensor_parallel,
            replica_num=replica_num,
            max_length=max_length,
            inference_engine_config={"engine": "deepspeed" if model else "echo", **engine},
            home=home,
            cluster="local",
        )
        self.run, self.entry = submission.prepare(self.config)
        self.keys = credentials.load_server(self.run)
        self.registry = Registry(self.config.home)
        self.job = subprocess.Popen(["sh", "-c", "read _", "job", str(self.run.path)], stdin=subprocess.PIPE)
        self.ranks, self._tasks, self._clients = [], [], []
        self.address = ""

    async def start(self):
        """Return when all replicas are ready."""
        self.address = await self.start_balancer()
        self.start_ranks()
        await until(lambda: self.state() == "ready")
        return self

    async def start_balancer(self):
        self.balancer = Balancer(self.run, self.config, self.keys.as_client)
        self.server = transport.create_server(self.balancer.services(), self.balancer.admits)
        address = f"127.0.0.1:{transport.listen(self.server, '127.0.0.1:0', self.keys)}"
        await self.server.start()
        self.entry = self.entry.model_copy(
            update={"job_id": str(self.job.pid), "state": "loading", "host": "node0", "address": address}
        )
        self.working = asyncio.create_task(self.balancer.work(self.entry))
        return address

    def start_ranks(self):
        self.ranks = [
            Rank(number, self.config, self.address, self.keys) for number in range(self.config.model_conf.world_size)
        ]
        self._tasks = [asyncio.create_task(rank.live()) for rank in self.ranks]

    def state(self):
        entry = self.registry.get(self.config.deployment_name)
        return entry and entry.state

    def client(self):
        """Return a new client, which is closed with the deployment."""
        self._clients.append(AsyncMIIClient(self.config))
        return self._clients[-1]

    def stats(self):
        """Return the load of every replica."""
        return [rank.engine.stats() for rank in self.ranks if rank.role.leads]

    def is_idle(self):
        """Whether no engine has anything in hand."""
        return all(stats.running == stats.waiting == 0 for stats in self.stats())

    async def stop(self):
        """End it and everything around it. Nothing happens the second time."""
        for client in self._clients:
            await client.close()
        await self.stop_balancer()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for rank in self.ranks:
            await rank.stop_engine()
        self.end_job()

    async def stop_balancer(self):
        self.balancer.stop("the test is over")
        await self.working
        await self.server.stop(None)

    def end_job(self):
        self.job.stdin.close()
        self.job.wait()


class InThread:
    """A deployment in an event loop on a thread of its own, for tests that block."""

    def __init__(self, home, **shape):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.deployment = Deployment(home, **shape)
        self.config = self.deployment.config
        self.do(self.deployment.start())

    def do(self, awaitable):
        """Run something in the deployment's event loop."""
        return asyncio.run_coroutine_threadsafe(awaitable, self._loop).result(60)

    def until(self, condition):
        return self.do(until(condition))

    def stop(self):
        self.do(self.deployment.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
