"""The client for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Literal, Self, TypeVar

import grpc
import grpc.aio

from mii_hpc import schedulers
from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.clients.status import DeploymentStatus, ReplicaStatus
from mii_hpc.config import GenerateParamsConfig, MIIConfig, validate
from mii_hpc.deployments.lookup import Found, Home, OwnHome, free_name
from mii_hpc.deployments.registry import Entry
from mii_hpc.deployments.state import DeploymentState
from mii_hpc.errors import (
    AuthenticationError,
    ConfigError,
    DeploymentError,
    DeploymentNotFoundError,
    DeploymentStoppingError,
    InvalidRequestError,
    MIIError,
    QueueFullError,
    RegistryError,
    RequestCancelledError,
    RequestError,
    RequestTimeoutError,
    UnavailableError,
)
from mii_hpc.generation import (
    Description,
    GenerationRequest,
    Prompt,
    Prompts,
    Received,
    Response,
    Tokenization,
    as_prompt,
    as_prompts,
    joined,
    new_seed,
)
from mii_hpc.rpc import transport, wire
from mii_hpc.rpc.frames import ClosedError, LostError, Metadata, RequestStream

CONNECT_SECONDS = (1.0,) * 10
"""How long a client waits for a connection, between two looks for the balancer in the registry."""
LOOKS_PER_QUESTION = 3
"""After the first of so many it asks whether the job still runs; many users share the scheduler."""
ANSWER_SECONDS = 10.0
"""How long it waits for the scheduler's answer, and for the balancer's to anything but a request."""
REMEMBERED_SECONDS = 2.0
"""For so long after a connection has failed, every call fails alike: many callers wait once, not one after another."""
TERMINATE_SECONDS = 60.0
"""How long terminate_server() waits for the job's end."""
SCHEDULER_SECONDS = 3.0
"""How often terminate_server() asks the scheduler; many users share it."""
CALL_ATTEMPTS = 5
"""How often anything but a request is asked when gRPC itself cancels it."""
IN_FLIGHT = 256
"""Requests of one generate() call that run at once."""

RESUME_SECONDS = 120.0
"""How long a request waits for a balancer that was lost; its own timeout may be shorter."""
FOLLOW_SECONDS = 0.3
"""How long between two looks for it."""

Retry = Literal["resume"] | None
"""What becomes of a request whose balancer is lost: it goes on where that comes back, or it raises the error."""

CLOSED = "the client was closed before the answer was complete"

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class AsyncMIIClient:
    """A client for use inside one event loop; every method belongs to the loop of the first call.

    `mii_config` names the deployment and its home, unless `home` is given: that of another user, who shares the
    deployment. The balancer's address is the one in the registry, unless `host` names another way to it,
    such as the "127.0.0.1" of an SSH tunnel; its port is `port_number` then, where that is set.
    """

    def __init__(self, mii_config: MIIConfig, host: str = "localhost", *, home: Home | None = None) -> None:
        if not mii_config.deployment_name:
            raise ConfigError("deployment_name='': a client needs the deployment's name")
        self.mii_config = mii_config
        self._host = host
        self._home = home or OwnHome(mii_config.home)
        self._connection: transport.Connection | None = None
        self._target = ("", b"", b"")  # address, certificate and identity that the connection is for
        self._metadata: Metadata | None = None
        self._stream: RequestStream | None = None
        self._connecting: asyncio.Task[transport.Connection] | None = None
        self._failure: tuple[float, MIIError] = (-REMEMBERED_SECONDS, MIIError())
        """When a connection has last failed, and why."""

    async def generate(
        self,
        prompts: Prompts,
        streaming_fn: Callable[[list[Response]], object] | None = None,
        *,
        timeout: float | None = None,
        retry: Retry = "resume",
        **options: Any,
    ) -> list[Response]:
        """Return the answers to one or more prompts, in their order.

        Each prompt is a request of its own, so a list uses all replicas. `options` are those of
        GenerateParamsConfig. With `streaming_fn` there is one prompt, and the function gets each piece of its answer
        as a list of one Response. `timeout` is in seconds, for the whole call: for finding the deployment, connecting,
        queueing and generating.

        When the balancer is lost, a request goes on where it comes back, with what has come of it so far; with
        `retry=None` it raises UnavailableError.

        Raises InvalidRequestError before anything is sent if an option is wrong. If some of the prompts fail, the
        first one's error is raised after all have ended, and its `responses` lists what came of each.
        """
        several = as_prompts(prompts)
        params = validate(
            GenerateParamsConfig, {**options, "stream": streaming_fn is not None or options.get("stream", False)}
        )
        deadline = _Deadline(timeout)
        if streaming_fn is not None:
            if len(several) != 1:
                raise InvalidRequestError(f"streaming_fn: takes one prompt at a time, not {len(several)}")
            pieces = []
            async with contextlib.aclosing(self._pieces(several[0], params, deadline, retry)) as stream:
                async for piece in stream:
                    pieces.append(piece)
                    streaming_fn([piece])
            return joined(pieces)
        return await self._generate_all(several, params, deadline, retry)

    __call__ = generate

    async def stream(
        self,
        prompt: Prompt | Sequence[int],
        *,
        timeout: float | None = None,
        retry: Retry = "resume",
        **options: Any,
    ) -> AsyncGenerator[Response]:
        """Yield the pieces of one prompt's answer as they are made. Leaving the iteration cancels the request.

        See generate() for `timeout` and `retry`.
        """
        params = validate(GenerateParamsConfig, {**options, "stream": True})
        whole = as_prompt(prompt)
        async with contextlib.aclosing(self._pieces(whole, params, _Deadline(timeout), retry)) as pieces:
            async for piece in pieces:
                yield piece

    async def tokenize(self, prompt: Prompt | Sequence[int], *, plain: bool = False) -> Tokenization:
        """Return a prompt as the model sees it; `plain` is without the special tokens that it begins or ends with."""
        whole = as_prompt(prompt)
        message = wire.pack_tokenize(whole, plain)
        return wire.unpack_tokenization(await self._call(lambda way: way.inference.Tokenize, message, follows=True))

    async def describe(self) -> Description:
        """Return what is served: its context, its tokenizer, and what its makers recommend."""
        answer = await self._call(lambda way: way.inference.Describe, pb.DescribeRequest(), follows=True)
        return wire.unpack_description(answer)

    async def status(self) -> DeploymentStatus:
        """Return the state of the deployment and of its replicas.

        Of one that does not answer the state alone is known. Raises DeploymentNotFoundError when there is no such
        deployment.
        """
        found = await self._found_anew()
        try:
            if found.entry.address:
                answer = await self._call(lambda way: way.deployment.Status, pb.StatusRequest())
                return _status(found.entry, DeploymentState(answer.state), answer.replicas)
            await asyncio.to_thread(check_live, found)
            return _status(found.entry, found.entry.state)
        except DeploymentNotFoundError:
            return _status(self._find().entry, DeploymentState.ENDED)
        except UnavailableError:
            found = await asyncio.to_thread(self._find)
            if not await asyncio.to_thread(schedulers.is_live, found.entry, found.home.is_own):
                return _status(found.entry, DeploymentState.ENDED)
            return _status(found.entry, DeploymentState.UNRESPONSIVE if found.entry.address else found.entry.state)

    async def terminate_server(self) -> None:
        """End the deployment; return when its job has withdrawn it from the registry.

        Requests that run get a few seconds to finish. A job that still waits in the queue is cancelled. Raises
        DeploymentNotFoundError when there is no such deployment, UnavailableError when it does not end.
        """
        found = await self._found_anew()
        if found.entry.address or not found.home.is_own:
            try:
                # The balancer refuses it unless the deployment is ours.
                await self._call(lambda way: way.deployment.Terminate, pb.TerminateRequest())
            except (UnavailableError, DeploymentNotFoundError):
                if not found.home.is_own:
                    raise
                await asyncio.to_thread(_cancel, found.entry)  # the balancer does not answer; the scheduler may
        else:
            await asyncio.to_thread(_cancel, found.entry)
        deadline, asked = time.monotonic() + TERMINATE_SECONDS, 0.0
        while (entry := await asyncio.to_thread(self._entry_of_run, found)) is not None:
            if found.home.is_own and time.monotonic() > asked + SCHEDULER_SECONDS:
                if not await asyncio.to_thread(schedulers.is_live, entry):
                    await asyncio.to_thread(free_name, found.home.path, entry)
                asked = time.monotonic()
            if time.monotonic() > deadline:
                raise self._unavailable(
                    f"has not ended after {TERMINATE_SECONDS:.0f} s: its {entry.job} still runs; try scancel"
                )
            await asyncio.sleep(0.2)
        await self.close()

    async def rotate_token(self, *, cancel_guests: bool = False) -> None:
        """Make the deployment's old tokens open nothing from now on, without touching requests that run.

        The owner's other clients, and those of the group it is shared with, read the new ones from their files.
        `cancel_guests` ends the requests that guests have in hand, with RequestCancelledError.
        """
        message = pb.RotateTokenRequest(cancel_guests=cancel_guests)
        await self._found_anew()
        try:
            await self._call(lambda way: way.deployment.RotateToken, message)
        finally:
            self._metadata = None

    async def close(self) -> None:
        """Close the connection. The deployment goes on; calls that run raise RequestCancelledError."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self._stream is not None:
            await self._stream.finish()
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _generate_all(
        self, prompts: list[Prompt], params: GenerateParamsConfig, deadline: _Deadline, retry: Retry
    ) -> list[Response]:
        room = asyncio.Semaphore(IN_FLIGHT)  # first come, first served: requests leave in the prompts' order
        batch = uuid.uuid4().hex

        async def one(prompt: Prompt, index: int = 0) -> list[Response]:
            position = str(wire.BatchPosition(batch, index, len(prompts)))
            async with (
                self._by(deadline),
                room,
                contextlib.aclosing(self._pieces(prompt, params, deadline, retry, position)) as pieces,
            ):
                return joined([piece async for piece in pieces])

        if len(prompts) == 1:
            return await one(prompts[0])
        tasks = [asyncio.create_task(one(prompt, index)) for index, prompt in enumerate(prompts)]
        try:
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            raise
        failed = next((outcome for outcome in outcomes if isinstance(outcome, BaseException)), None)
        if failed is not None:
            failed.responses = list(outcomes)  # type: ignore[attr-defined]
            raise failed
        return list(itertools.chain.from_iterable(outcomes))  # type: ignore[arg-type]

    async def _pieces(
        self,
        prompt: Prompt,
        params: GenerateParamsConfig,
        deadline: _Deadline,
        retry: Retry,
        position: str = "",
    ) -> AsyncGenerator[Response]:
        """Yield the pieces of a request's answers; when the balancer is lost, go on where it comes back."""
        if retry not in ("resume", None):
            raise InvalidRequestError(f"retry={retry!r}: must be 'resume' or None")
        if retry and params.seed is None:  # what is drawn after an interruption must go on with what was drawn before
            params = params.model_copy(update={"seed": new_seed()})
        message = wire.pack_request(GenerationRequest(uuid.uuid4().hex, prompt, params))
        received = Received(params.num_return_sequences)
        moved = latest = 0
        lost_at: float | None = None
        while True:
            try:
                async with contextlib.aclosing(self._attempt(message, received, deadline, position)) as pieces:
                    async for piece in pieces:
                        received.take(piece)
                        lost_at = None
                        latest = piece.migrations = moved + piece.migrations
                        yield piece
                return
            except _TokenReplacedError:
                continue
            except _BalancerLostError as lost:
                if received.ended:
                    return
                lost_at = lost_at or time.monotonic()
                if not retry or time.monotonic() > lost_at + RESUME_SECONDS:
                    raise lost.error from None
            except QueueFullError:  # where all who lost the balancer come back at once
                if lost_at is None or time.monotonic() > lost_at + RESUME_SECONDS:
                    raise
            await self._follow(deadline, lost_at + RESUME_SECONDS)
            moved = latest + 1
            wire.set_resume(message, received.resume)

    async def _attempt(
        self, message: pb.GenerateRequest, received: Received, deadline: _Deadline, position: str
    ) -> AsyncGenerator[Response]:
        """Send a request and yield what comes of it; pieces that gather while the caller is busy come joined.

        Raises _BalancerLostError when connection or stream breaks, _TokenReplacedError where there is another token.
        """
        async with self._by(deadline):
            connection = await self._connected()
        replica: int | None = None
        gathered: list[bytes] = []
        arrived = asyncio.Event()

        def take(chunk: bytes) -> None:
            gathered.append(chunk)
            arrived.set()

        stream = self._stream_on(connection)
        try:
            asking = stream.request(message.SerializeToString(), take, timeout=deadline.left, position=position)
            with asking as ended:
                ended.add_done_callback(lambda _: arrived.set())
                while gathered or not ended.done():
                    async with self._by(deadline):
                        await arrived.wait()
                    arrived.clear()
                    pieces = [wire.unpack_response(chunk) for chunk in gathered]
                    gathered.clear()
                    for piece in joined(pieces) if len(pieces) > 1 else pieces:
                        replica = piece.replica
                        yield piece
                ended.result()
        except ClosedError:
            raise self._located(RequestCancelledError(CLOSED), replica) from None
        except LostError as lost:
            raise self._interrupted(lost, connection, stream.metadata, replica) from None
        except AuthenticationError as error:
            if self._has_new_token(stream.metadata):
                raise _TokenReplacedError from None
            raise self._located(error, replica) from None
        except RequestTimeoutError:
            raise self._located(deadline.passed(), replica) from None
        except MIIError as error:
            located = self._located(error, replica)
            raise (_BalancerLostError(located) if self._has_moved(error, connection) else located) from None
        if not received.ended:
            cut = RequestError("the answer was cut short: the stream ended before its last piece")
            raise self._located(cut, replica)

    def _stream_on(self, connection: transport.Connection) -> RequestStream:
        """Return the stream of all requests; another once it has ended, or there is a new token or connection."""
        assert self._metadata is not None
        stream = self._stream
        if (
            stream is None
            or stream.has_ended
            or (stream.method, stream.metadata) != (connection.generate, self._metadata)
        ):
            stream = self._stream = RequestStream(connection.generate, self._metadata, transport.IDLE_SECONDS)
        return stream

    async def _follow(self, deadline: _Deadline, until: float) -> None:
        """Return once the balancer is connected again, wherever it is; raise why not when that takes too long."""
        async with self._by(deadline):
            while True:
                await asyncio.sleep(FOLLOW_SECONDS)
                try:
                    await self._connected()
                    return
                except DeploymentNotFoundError:
                    raise self._unavailable("has ended") from None
                except UnavailableError:
                    if time.monotonic() > until:
                        raise

    async def _call(
        self,
        method: Callable[[transport.Connection], grpc.aio.UnaryUnaryMultiCallable[Request, Answer]],
        request: Request,
        follows: bool = False,
        attempts: int = CALL_ATTEMPTS,
    ) -> Answer:
        """Call the balancer; one that `follows` is made again, once, where a balancer that was lost comes back."""
        connection = await self._connected()
        shown = self._metadata
        try:
            return await method(connection)(request, timeout=ANSWER_SECONDS, metadata=shown)
        except grpc.aio.AioRpcError as failure:
            if failure.code() is grpc.StatusCode.UNAUTHENTICATED and self._has_new_token(shown):
                return await self._call(method, request, follows)
            if wire.is_interrupted(failure) and not wire.is_cancelled(failure) and attempts > 1:
                await asyncio.sleep(FOLLOW_SECONDS)
                return await self._call(method, request, follows, attempts - 1)
            if failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise self._unavailable(f"does not answer within {ANSWER_SECONDS:.0f} s") from None
            error = self._failed(failure, connection)
            if not follows or not wire.is_lost(failure):
                raise error from None
        except asyncio.CancelledError:
            if transport.is_being_cancelled():
                raise
            raise self._located(RequestCancelledError(CLOSED)) from None
        await self._follow(_Deadline(None), time.monotonic() + ANSWER_SECONDS)
        return await self._call(method, request)

    def _has_new_token(self, shown: Metadata | None) -> bool:
        """Whether there is another token than a call has shown; the next call shows that."""
        with contextlib.suppress(RegistryError, DeploymentNotFoundError):
            self._metadata = transport.authorization(self._find().credentials)
            return self._metadata != shown
        return False

    def _interrupted(
        self, lost: LostError, connection: transport.Connection, shown: Metadata, replica: int | None
    ) -> Exception:
        """Return what the end of the stream means to a request: an error, or that it may go on elsewhere."""
        if lost.is_silent:
            self._leave(connection)
            return _BalancerLostError(self._unavailable("gives no sign of life"))
        if lost.failure is None:
            return _BalancerLostError(self._unavailable("has ended the stream of requests"))
        if lost.failure.code() is grpc.StatusCode.UNAUTHENTICATED and self._has_new_token(shown):
            return _TokenReplacedError()
        error = self._failed(lost.failure, connection, replica)
        return _BalancerLostError(error) if lost.is_of_connection or wire.is_interrupted(lost.failure) else error

    def _failed(
        self, failure: grpc.aio.AioRpcError, connection: transport.Connection, replica: int | None = None
    ) -> MIIError:
        if failure.code() is grpc.StatusCode.UNAUTHENTICATED:
            self._metadata = None  # the token may have been rotated; the next call reads it again
        if wire.is_lost(failure):
            self._leave(connection)  # the balancer may have moved (a requeued job)
            with contextlib.suppress(RegistryError, DeploymentNotFoundError):
                self._find()
                return self._unavailable("does not answer: " + (failure.details() or "connection lost"))
            return self._unavailable("has ended")
        return self._located(wire.error_of(failure), replica)

    def _has_moved(self, error: MIIError, connection: transport.Connection) -> bool:
        """Whether the name is, or will be, another job's; the next call looks it up again then."""
        if not isinstance(error, DeploymentStoppingError) or not error.comes_back:
            return False
        self._leave(connection)
        return True

    def _leave(self, connection: transport.Connection) -> None:
        """Have the next call look the balancer up again; a connection is not closed while others may run on it."""
        if self._connection is connection:
            self._connection = None

    def _located(self, error: MIIError, replica: int | None = None) -> MIIError:
        """Return an error with the deployment and the replica that it is about, where the server has not said them."""
        if isinstance(error, DeploymentError | RequestError):
            error.deployment_name = error.deployment_name or self.mii_config.deployment_name
        if isinstance(error, RequestError) and error.replica is None:
            error.replica = replica
        return error

    def _unavailable(self, predicate: str) -> UnavailableError:
        name = self.mii_config.deployment_name
        return UnavailableError(f"deployment '{name}' {predicate}", deployment_name=name)

    async def _connected(self) -> transport.Connection:
        """Return the connection to the balancer, once it is there; all callers wait for one, and learn one's failure.

        They go on in the order in which they came, so that no request overtakes another.
        """
        if self._connecting is None or self._connecting.done():
            if self._connection is not None and self._connection.is_ready and self._metadata is not None:
                return self._connection
            at, failure = self._failure
            if time.monotonic() < at + REMEMBERED_SECONDS:
                raise copy.copy(failure)
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, if all left
        connecting = self._connecting
        try:
            await asyncio.wait({connecting})
            return connecting.result()
        except asyncio.CancelledError:
            if transport.is_being_cancelled():
                raise
            raise self._located(RequestCancelledError(CLOSED)) from None
        except MIIError as error:
            raise copy.copy(error) from None  # each caller its own, to which its `responses` belong

    async def _connect(self) -> transport.Connection:
        """Connect; ask whether the job still runs as soon as that takes long."""
        try:
            for look, seconds in enumerate(CONNECT_SECONDS):
                found = await asyncio.to_thread(self._find)
                self._metadata = transport.authorization(found.credentials)
                if not found.entry.address:
                    await asyncio.to_thread(check_live, found)
                target = self._way_to(found.entry), found.credentials.certificate, found.credentials.identity
                if self._connection is None or target != self._target:
                    self._connection, self._target = transport.Connection(target[0], found.credentials), target
                connection = self._connection
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(connection.channel.channel_ready(), seconds)
                    return connection
                if look % LOOKS_PER_QUESTION == 0:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(asyncio.to_thread(check_live, found), ANSWER_SECONDS)
            raise self._unavailable(f"does not answer at {self._target[0]} within {sum(CONNECT_SECONDS):.0f} s")
        except MIIError as error:
            self._failure = time.monotonic(), error
            stale, self._connection = self._connection, None
            if stale is not None:
                await stale.channel.close()
            raise

    async def _found_anew(self) -> Found:
        """Return the deployment as it is now; a connection to a job that has given the name away is not used again."""
        found = await asyncio.to_thread(self._find)
        if found.entry.address and self._target[0] != self._way_to(found.entry):
            self._connection = None
        return found

    def _find(self) -> Found:
        return self._home.get(self.mii_config.deployment_name)

    def _entry_of_run(self, found: Found) -> Entry | None:
        """Return the entry of the run that was found, as it is now; None when the run has the name no longer."""
        with contextlib.suppress(DeploymentNotFoundError):
            entry = self._find().entry
            return entry if entry.fingerprint == found.entry.fingerprint else None
        return None

    def _way_to(self, entry: Entry) -> str:
        if not entry.address:
            raise self._unavailable(f"is not serving yet: its {entry.job} is {entry.state}")
        if self._host == "localhost":
            return entry.address
        return f"{self._host}:{self.mii_config.port_number or entry.address.rpartition(':')[2]}"

    @contextlib.asynccontextmanager
    async def _by(self, deadline: _Deadline) -> AsyncIterator[None]:
        """Raise RequestTimeoutError when what is done within takes longer; any other TimeoutError passes."""
        try:
            async with asyncio.timeout(deadline.left) as scope:
                yield
        except TimeoutError as error:
            if not scope.expired() or isinstance(error, MIIError):
                raise
            raise self._located(deadline.passed()) from None


class _BalancerLostError(Exception):
    """The connection to the balancer broke; `error` is what that means to the caller."""

    def __init__(self, error: MIIError) -> None:
        super().__init__(str(error))
        self.error = error


class _TokenReplacedError(Exception):
    """The request was refused for a token that was rotated; the next attempt shows the new one."""


class _Deadline:
    """By when a call must be done; its timeout is in seconds, None without one."""

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._at = None if timeout is None else time.monotonic() + timeout

    @property
    def left(self) -> float | None:
        """The seconds until then, some even when it has passed; None when there is no deadline."""
        return None if self._at is None else max(0.001, self._at - time.monotonic())

    def passed(self) -> RequestTimeoutError:
        """Return the error of a call that took longer."""
        return RequestTimeoutError(f"timeout={self._timeout}: it passed before the answer was complete")


def check_live(found: Found) -> None:
    """Raise DeploymentNotFoundError when the job of a deployment that is in the registry no longer runs.

    Where another job is to follow it is UnavailableError: that takes the name in a moment.
    """
    entry = found.entry
    if not schedulers.is_live(entry, found.home.is_own):
        if entry.successor:
            raise UnavailableError(
                f"deployment '{entry.deployment_name}' does not answer: its {entry.job} no longer runs, and job "
                f"{entry.successor} is to follow",
                deployment_name=entry.deployment_name,
            )
        raise DeploymentNotFoundError(
            f"deployment '{entry.deployment_name}' has ended: its {entry.job} no longer runs",
            deployment_name=entry.deployment_name,
        )


def _cancel(entry: Entry) -> None:
    """Ask the scheduler to end a deployment's job, and first the one that is to follow."""
    if entry.successor:
        schedulers.job_of(entry.model_copy(update={"job_id": entry.successor})).cancel()
    schedulers.job_of(entry).cancel()


def _status(entry: Entry, state: DeploymentState, replicas: Iterable[pb.ReplicaStatus] = ()) -> DeploymentStatus:
    return DeploymentStatus(
        deployment_name=entry.deployment_name,
        state=state,
        job_id=entry.job_id,
        host=entry.host,
        started=entry.started,
        ends=entry.ends,
        until=entry.until,
        successor=entry.successor,
        replicas=tuple(
            ReplicaStatus(
                index=replica.index,
                state=replica.state,
                host=replica.host,
                epoch=replica.epoch,
                in_flight=replica.in_flight,
                served=replica.served,
                detail=replica.detail,
                load=wire.unpack_load(replica.load) if replica.HasField("load") else None,
                migrations=replica.migrations,
                resumed=replica.resumed,
                lost=replica.lost,
            )
            for replica in replicas
        ),
    )
