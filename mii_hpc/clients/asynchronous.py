"""Clients of a deployment: one for asyncio, and one for all else, which runs the first on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import threading
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import grpc
import grpc.aio

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc._proto import mii_hpc_pb2_grpc as pb_grpc
from mii_hpc.config import GenerateParamsConfig, MIIConfig, validate
from mii_hpc.deployments import credentials, sharing
from mii_hpc.deployments.registry import Entry, Registry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.errors import (
    ConfigError,
    DeploymentNotFoundError,
    InvalidRequestError,
    MIIError,
    RegistryError,
    RequestCancelledError,
    RequestError,
    RequestTimeoutError,
    UnavailableError,
)
from mii_hpc.generation import GenerationRequest, Load, Response, joined
from mii_hpc.rpc import transport, wire

CONNECT_SECONDS = 20.0
TERMINATE_SECONDS = 60.0
"""How long terminate_server() waits for the job's end."""
IN_FLIGHT = 256
"""Requests of one generate() call that are under way at once."""

T = TypeVar("T")
Request = TypeVar("Request")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class ReplicaStatus:
    """One replica.

    Attributes:
        state: "waiting", "forming", "loading" or "ready".
        epoch: how often it was formed.
        in_flight: requests that the balancer has passed to it and that have not ended.
        served: requests that it was given since the balancer started.
        detail: what it is doing, or why it is not ready.
        load: what its engine has in hand; None when it is not ready, or did not answer at once.
    """

    index: int
    state: str
    host: str
    epoch: int
    in_flight: int
    served: int
    detail: str
    load: Load | None = None


@dataclass(frozen=True)
class DeploymentStatus:
    """A deployment: state is "pending", "loading", "ready" or "stopping"; times are seconds since the epoch."""

    deployment_name: str
    state: str
    job_id: str
    host: str
    started: float | None
    ends: float | None
    replicas: tuple[ReplicaStatus, ...]


class Located(NamedTuple):
    """A deployment, as a client finds it."""

    entry: Entry
    credentials: credentials.ClientCredentials


def locate(config: MIIConfig, sharing_home: bool = False) -> Located:
    """Find a deployment by its name, in the user's own home or, if `sharing_home`, in somebody's who shares it.

    Raises DeploymentNotFoundError when it is not there, RegistryError when what is there cannot be trusted.
    """
    if sharing_home:
        entry, keys = sharing.read(config.home, config.deployment_name)
    else:
        found = Registry(config.home).get(config.deployment_name)
        if found is None:
            raise DeploymentNotFoundError(
                f"deployment '{config.deployment_name}' is not in the registry {config.home / 'registry'}"
            )
        entry, keys = found, credentials.load_owner(RunDir(found.run_dir))
    if keys.fingerprint != entry.fingerprint:
        raise RegistryError(f"deployment '{config.deployment_name}': its certificate is not the one in the registry")
    return Located(entry, keys)


class AsyncMIIClient:
    """A client for use inside one event loop; every method belongs to the loop of the first call.

    `mii_config` names the deployment and the home of its registry; `sharing_home` says that this is the home of
    somebody else, who shares the deployment with you and is trusted in that. The balancer's address is the one in
    the registry, unless `host` names another way to it, such as the "127.0.0.1" of an SSH tunnel; its port is
    `port_number` then, where that is set.
    """

    def __init__(self, mii_config: MIIConfig, host: str = "localhost", *, sharing_home: bool = False) -> None:
        if not mii_config.deployment_name:
            raise ConfigError("deployment_name='': a client needs the deployment's name")
        self.mii_config = mii_config
        self._host = host
        self._sharing_home = sharing_home
        self._connection: transport.Connection | None = None
        self._target = ("", b"")  # address and certificate that the connection is for
        self._metadata: tuple[tuple[str, str], ...] | None = None
        self._connecting = asyncio.Lock()

    async def generate(
        self,
        prompts: str | Sequence[str],
        streaming_fn: Callable[[list[Response]], object] | None = None,
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> list[Response]:
        """Return the answers to one or more prompts, in their order.

        Each prompt is a request of its own, so a list uses all replicas. `options` are those of
        GenerateParamsConfig. With `streaming_fn` there is one prompt, and the function gets each piece of its answer
        as a list of one Response. `timeout` is in seconds, for the whole call.

        Raises InvalidRequestError before anything is sent if an option is wrong. If some of the prompts fail, the
        first one's error is raised after all have ended, and its `responses` lists what came of each.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not all(isinstance(text, str) for text in texts):
            raise InvalidRequestError("prompts: must be a string or strings")
        params = validate(
            GenerateParamsConfig, {**options, "stream": streaming_fn is not None or options.get("stream", False)}
        )
        async with _deadline(timeout) as deadline:
            if streaming_fn is not None:
                if len(texts) != 1:
                    raise InvalidRequestError(f"streaming_fn: takes one prompt at a time, not {len(texts)}")
                pieces = []
                async with contextlib.aclosing(self._pieces(texts[0], params, deadline)) as stream:
                    async for piece in stream:
                        pieces.append(piece)
                        streaming_fn([piece])
                return joined(pieces)
            return await self._generate_all(texts, params, deadline)

    __call__ = generate

    async def stream(self, prompt: str, *, timeout: float | None = None, **options: Any) -> AsyncGenerator[Response]:
        """Yield the pieces of one prompt's answer as they are made. Leaving the iteration cancels the request."""
        params = validate(GenerateParamsConfig, {**options, "stream": True})
        deadline = None if timeout is None else time.monotonic() + timeout
        async with contextlib.aclosing(self._pieces(prompt, params, deadline)) as pieces:
            async for piece in pieces:
                yield piece

    async def status(self) -> DeploymentStatus:
        """Return the state of the deployment and of its replicas."""
        entry = self._locate().entry
        if not entry.address:
            return DeploymentStatus(entry.deployment_name, entry.state, entry.job_id, "", None, entry.ends, ())
        answer = await self._call(lambda deployment: deployment.Status, pb.StatusRequest())
        return DeploymentStatus(
            deployment_name=answer.deployment_name,
            state=answer.state,
            job_id=answer.job_id,
            host=entry.host,
            started=entry.started,
            ends=entry.ends,
            replicas=tuple(
                ReplicaStatus(
                    index=r.index,
                    state=r.state,
                    host=r.host,
                    epoch=r.epoch,
                    in_flight=r.in_flight,
                    served=r.served,
                    detail=r.detail,
                    load=wire.unpack_load(r.load) if r.HasField("load") else None,
                )
                for r in answer.replicas
            ),
        )

    async def terminate_server(self) -> None:
        """End the deployment; return when its job has withdrawn it from the registry.

        Requests that run get a few seconds to finish. A job that still waits in the queue is cancelled. Raises
        DeploymentNotFoundError when there is no such deployment, UnavailableError when it does not end.
        """
        from mii_hpc.submission import submit as submission

        located = self._locate()
        if self._sharing_home:
            # The deployment refuses it, in its own words.
            await self._call(lambda deployment: deployment.Terminate, pb.TerminateRequest())
        entry, registry = located.entry, Registry(self.mii_config.home)
        job = submission.job_of(entry)
        if entry.address:
            try:
                await self._call(lambda deployment: deployment.Terminate, pb.TerminateRequest())
            except UnavailableError:
                await asyncio.to_thread(job.cancel)  # nobody answers; perhaps the scheduler can help
        else:
            await asyncio.to_thread(job.cancel)
        deadline = time.monotonic() + TERMINATE_SECONDS
        while (now := registry.get(entry.deployment_name)) is not None and now.run_dir == entry.run_dir:
            if not await asyncio.to_thread(submission.is_live, now):
                registry.withdraw(now)
            if time.monotonic() > deadline:
                raise UnavailableError(f"job {entry.job_id} has not ended after {TERMINATE_SECONDS:.0f} s; try scancel")
            await asyncio.sleep(0.2)
        await self.close()

    async def rotate_token(self) -> None:
        """Make the deployment's old tokens open nothing from now on, without touching requests that run.

        The owner's other clients, and those of the group it is shared with, read the new ones from their files.
        """
        await self._call(lambda deployment: deployment.RotateToken, pb.RotateTokenRequest())
        self._metadata = None

    async def close(self) -> None:
        """Close the connection. The deployment goes on."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _generate_all(
        self, prompts: list[str], params: GenerateParamsConfig, deadline: float | None
    ) -> list[Response]:
        room = asyncio.Semaphore(IN_FLIGHT)  # first come, first served: requests leave in the prompts' order

        batch = uuid.uuid4().hex

        async def one(prompt: str, index: int = 0) -> list[Response]:
            position = wire.BatchPosition(batch, index, len(prompts))
            async with room, contextlib.aclosing(self._pieces(prompt, params, deadline, position)) as pieces:
                return joined([piece async for piece in pieces])

        if len(prompts) == 1:
            return await one(prompts[0])
        await self._connected()
        tasks = [asyncio.create_task(one(prompt, index)) for index, prompt in enumerate(prompts)]
        try:
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            raise
        failed = next((outcome for outcome in outcomes if isinstance(outcome, BaseException)), None)
        if failed is not None:
            if isinstance(failed, RequestError):
                failed.responses = list(outcomes)
            raise failed
        return list(itertools.chain.from_iterable(outcomes))  # type: ignore[arg-type]

    async def _pieces(
        self,
        prompt: str,
        params: GenerateParamsConfig,
        deadline: float | None,
        position: wire.BatchPosition | None = None,
    ) -> AsyncGenerator[Response]:
        message = wire.pack_request(GenerationRequest(uuid.uuid4().hex, prompt, params))
        connection = await self._connected()
        placed = ((wire.POSITION_KEY, str(position)),) if position is not None else ()
        call = connection.inference.Generate(
            message, timeout=_left(deadline), metadata=(*(self._metadata or ()), *placed)
        )
        unfinished = set(range(params.num_return_sequences))
        try:
            served_by = dict(await call.initial_metadata())
            replica = int(served_by.get(wire.REPLICA_KEY, -1))
            async for chunk in call:
                piece = wire.unpack_response(chunk, replica)
                unfinished -= {piece.index} if piece.ended else set()
                yield piece
        except grpc.aio.AioRpcError as failure:
            raise self._failed(failure, connection) from None
        except asyncio.CancelledError:
            if transport.is_being_cancelled():
                raise
            raise RequestCancelledError("the client was closed before the answer was complete") from None
        finally:
            call.cancel()
        if unfinished:
            raise RequestError("the answer was cut short: the stream ended before its last piece")

    async def _call(
        self,
        method: Callable[[pb_grpc.DeploymentStub], grpc.aio.UnaryUnaryMultiCallable[Request, Answer]],
        request: Request,
    ) -> Answer:
        connection = await self._connected()
        try:
            return await method(connection.deployment)(request, timeout=CONNECT_SECONDS, metadata=self._metadata)
        except grpc.aio.AioRpcError as failure:
            raise self._failed(failure, connection) from None

    def _failed(self, failure: grpc.aio.AioRpcError, connection: transport.Connection) -> MIIError:
        if failure.code() is grpc.StatusCode.UNAUTHENTICATED:
            self._metadata = None  # the token may have been rotated; the next call reads it anew
        if failure.code() is grpc.StatusCode.UNAVAILABLE and not wire.is_ours(failure):
            # The balancer may have moved (a requeued job); the next call looks it up anew. Not closed: other calls
            # may still run on that connection, and shall end as they end.
            if self._connection is connection:
                self._connection = None
            with contextlib.suppress(RegistryError, DeploymentNotFoundError):
                self._locate()
                return UnavailableError(self._says("does not answer: " + (failure.details() or "connection lost")))
            return UnavailableError(self._says("is gone"))
        return wire.error_of(failure)

    async def _connected(self) -> transport.Connection:
        """Return the connection to the balancer, once it is there; a request must not overtake another."""
        async with self._connecting:
            if self._connection is None or not self._connection.is_ready or self._metadata is None:
                located = self._locate()
                self._metadata = transport.authorization(located.credentials)
                target = self._way_to(located.entry), located.credentials.certificate
                if self._connection is None or target != self._target:
                    self._connection, self._target = transport.Connection(target[0], located.credentials), target
            try:
                await asyncio.wait_for(self._connection.channel.channel_ready(), CONNECT_SECONDS)
            except TimeoutError:
                await self.close()
                raise UnavailableError(
                    self._says(f"does not answer at {self._target[0]} within {CONNECT_SECONDS:.0f} s")
                ) from None
            return self._connection

    def _locate(self) -> Located:
        return locate(self.mii_config, self._sharing_home)

    def _way_to(self, entry: Entry) -> str:
        if not entry.address:
            raise UnavailableError(self._says(f"is not serving yet: job {entry.job_id} is {entry.state}"))
        if self._host == "localhost":
            return entry.address
        return f"{self._host}:{self.mii_config.port_number or entry.address.rpartition(':')[2]}"

    def _says(self, predicate: str) -> str:
        return f"deployment '{self.mii_config.deployment_name}' {predicate}"


class MIIClient:
    """A client for plain scripts. It works inside a running event loop, from several threads, and after a fork.

    See AsyncMIIClient for what the arguments mean and what the methods guarantee; these are the same, blocking.
    """

    def __init__(self, mii_config: MIIConfig, host: str = "localhost", *, sharing_home: bool = False) -> None:
        self.mii_config = mii_config
        self._host = host
        self._sharing_home = sharing_home
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._calls = 0
        self._new_client()  # refuses what is wrong now, not at the first call
        _Forks.watch(self)

    def generate(
        self,
        prompts: str | Sequence[str],
        streaming_fn: Callable[[list[Response]], object] | None = None,
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> list[Response]:
        """Return the answers to one or more prompts, in their order. See AsyncMIIClient.generate()."""
        if streaming_fn is None:
            return self._run(lambda client: client.generate(prompts, timeout=timeout, **options))
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if len(texts) != 1:
            raise InvalidRequestError(f"streaming_fn: takes one prompt at a time, not {len(texts)}")
        pieces = []
        for piece in self.stream(texts[0], timeout=timeout, **options):  # so that the function runs on this thread
            pieces.append(piece)
            streaming_fn([piece])
        return joined(pieces)

    __call__ = generate

    def stream(self, prompt: str, *, timeout: float | None = None, **options: Any) -> Iterator[Response]:
        """Yield the pieces of one prompt's answer as they are made. Leaving the iteration cancels the request."""
        with self._working() as worker:
            pieces = worker.client.stream(prompt, timeout=timeout, **options)
            try:
                while (piece := worker.run(lambda _: anext(pieces, None))) is not None:
                    yield piece
            finally:
                worker.run(lambda _: pieces.aclose())

    def status(self) -> DeploymentStatus:
        """Return the state of the deployment and of its replicas."""
        return self._run(lambda client: client.status())

    def terminate_server(self) -> None:
        """End the deployment; return when its job has withdrawn it. See AsyncMIIClient.terminate_server()."""
        self._run(lambda client: client.terminate_server())

    def close(self) -> None:
        """Close the connection. The deployment goes on, and a later call connects again."""
        with self._lock:
            self._stop()

    def rotate_token(self) -> None:
        """Make the deployment's old tokens open nothing from now on. See AsyncMIIClient.rotate_token()."""
        self._run(lambda client: client.rotate_token())

    def check(self) -> None:
        """Raise DeploymentNotFoundError unless the deployment exists now."""
        from mii_hpc.submission import submit as submission

        entry = locate(self.mii_config, self._sharing_home).entry
        if not submission.is_live(entry):
            raise DeploymentNotFoundError(
                f"deployment '{entry.deployment_name}' is gone: its job {entry.job_id} has ended without notice"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, call: Callable[[AsyncMIIClient], Coroutine[Any, Any, T]]) -> T:
        with self._working() as worker:
            return worker.run(call)

    @contextlib.contextmanager
    def _working(self) -> Iterator[_Worker]:
        """Yield the worker, and count the call that it is for."""
        with self._lock:
            if self._worker is None:
                self._worker = _Worker(self._new_client())
            elif self._worker.pid != os.getpid():
                raise UnavailableError(
                    "this process was forked while requests of its parent were running, after which gRPC does not "
                    "work in it; fork before or between requests, or start processes with 'spawn'"
                )
            worker = self._worker
            self._calls += 1
        try:
            yield worker
        finally:
            with self._lock:
                self._calls -= 1

    def _new_client(self) -> AsyncMIIClient:
        return AsyncMIIClient(self.mii_config, self._host, sharing_home=self._sharing_home)

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None and worker.pid == os.getpid():
            worker.stop()

    def before_fork(self) -> None:
        """Let go of gRPC, which survives a fork only while none of its threads is at work."""
        self._lock.acquire()
        if self._calls == 0:
            self._stop()

    def after_fork(self) -> None:
        """Go on, in the parent as in the child; the next call connects anew."""
        self._lock.release()


class _Forks:
    """The clients of this process, told of every fork."""

    _clients: ClassVar[weakref.WeakSet[MIIClient] | None] = None
    _held: ClassVar[list[MIIClient]] = []

    @classmethod
    def watch(cls, client: MIIClient) -> None:
        if cls._clients is None:
            cls._clients = weakref.WeakSet()
            os.register_at_fork(before=cls._before, after_in_parent=cls._after, after_in_child=cls._after)
        cls._clients.add(client)

    @classmethod
    def _before(cls) -> None:
        cls._held = list(cls._clients or ())
        for client in cls._held:
            client.before_fork()
        gc.collect()  # gRPC stops its threads when the last of its objects is freed

    @classmethod
    def _after(cls) -> None:
        for client in cls._held:
            client.after_fork()
        cls._held = []


class _Worker:
    """A thread with an event loop, in which one AsyncMIIClient lives."""

    def __init__(self, client: AsyncMIIClient) -> None:
        self.client = client
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mii-client", daemon=True)
        self._thread.start()

    def run(self, call: Callable[[AsyncMIIClient], Coroutine[Any, Any, T]]) -> T:
        async def awaited() -> T:
            return await call(self.client)

        future = asyncio.run_coroutine_threadsafe(awaited(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C here ends the request there
            raise

    def stop(self) -> None:
        self.run(lambda client: client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextlib.asynccontextmanager
async def _deadline(timeout: float | None) -> AsyncIterator[float | None]:
    """Yield the time by which all must be done; raise RequestTimeoutError if it is not."""
    try:
        async with asyncio.timeout(timeout):
            yield None if timeout is None else time.monotonic() + timeout
    except TimeoutError as error:
        if isinstance(error, MIIError):
            raise
        raise RequestTimeoutError(f"timeout={timeout}: it passed before the answer was complete") from None


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.001, deadline - time.monotonic())
