"""Requests on their way through the balancer: to a replica, and on to another when that one is lost."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator

import grpc.aio

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.config import MIIConfig
from mii_hpc.errors import (
    AuthenticationError,
    DeploymentStoppingError,
    InvalidRequestError,
    MIIError,
    QueueFullError,
    ReplicaLostError,
    RequestCancelledError,
    RequestError,
    RequestTimeoutError,
    UnavailableError,
)
from mii_hpc.generation import GUEST, OWNER, Received, new_seed
from mii_hpc.job.balancer.access import Access
from mii_hpc.job.balancer.connection import ReplicaConnection
from mii_hpc.job.balancer.ending import Ending
from mii_hpc.job.balancer.pace import Pace
from mii_hpc.job.balancer.router import Router
from mii_hpc.rpc import frames, transport, wire
from mii_hpc.rpc.frames import LostError, ServedRequest
from mii_hpc.rpc.wire import BatchPosition, Context, Method

SUSPECT_LOSSES = 2
"""A request is given up when so many replicas in a row were lost before they gave it a token: it may be the cause."""
TRIAL_SECONDS = 1.0
"""A suspect has this long to get its first token before the next is tried beside it, and twice as long each time."""
DOUBLINGS = 6
RECENT_SECONDS = 60.0
"""Where another replica was lost in this time, which had not a request in hand, it is not the reason."""
FULL_SECONDS = 0.1
"""For so long guests are refused by what a replica has said of its queue: to refuse costs an engine, which has a step
to make meanwhile, more than the balancer."""
IDLE_SECONDS = 30.0
"""A caller's stream without a request is ended after this."""
GUESTS_REST = 3.0
"""After a call of a guest that is no request, there is none for so many times as long: a replica tokenizes for one
caller at a time, and each call takes from its engine's steps."""
MOST_REST = 1.0
MAX_REQUESTS = 16_384
"""Requests of one stream that may be open at once."""


class Relay:
    """Passes requests to replicas; when one is lost, what it had in hand goes on at another.

    A request moves with what has come of it, so that its answer is what it would have been. One of which a lost replica
    had not given a token yet may be what killed it: such requests are tried one after the other, so that one that kills
    engines is found out at its second, and no other is blamed for it. When that takes long, others are tried beside it,
    and none of those that a replica is lost with is blamed. Neither is any while replicas are lost without it, too.

    `on_broken` is called with a replica's index, its epoch and a reason when the connection to it broke.

    Attributes:
        pace: what long requests of guests go by.
        guest_calls: how many calls of guests are open.
        migrations: how many requests went on elsewhere because a replica was lost, by its index.
        resumed: how many came because their balancer was lost or replaced, by the replica where they went on.
        lost: how many were given up because a replica was lost, by its index.
    """

    def __init__(
        self,
        config: MIIConfig,
        router: Router,
        ending: Ending,
        access: Access,
        on_broken: Callable[[int, int, str], None],
    ) -> None:
        self._access = access
        self._of_guests: set[ServedRequest] = set()
        self.guest_calls, self._most_guest_calls = 0, config.limits.guest_calls
        self.pace = Pace(config.limits.guest_waiting_bytes)
        self._guests_turn = asyncio.Lock()
        self._full: dict[int, tuple[float, str]] = {}
        """Until when guests are refused by a replica, by its index, and what it says."""
        self._deployment_name = config.deployment_name
        self._limit, self._hold = config.migration_limit, config.hold_seconds
        self._router, self._ending, self._on_broken = router, ending, on_broken
        self._suspects = asyncio.Lock()
        self._on_trial: list[_Request] = []
        self._losses: dict[tuple[int, int], float] = {}
        """When replicas were lost of late for no known reason, by index and epoch."""
        self._explained: set[tuple[int, int]] = set()
        """Those that were lost for a request which was given up."""
        self.migrations: collections.Counter[int] = collections.Counter()
        self.resumed: collections.Counter[int] = collections.Counter()
        self.lost: collections.Counter[int] = collections.Counter()

    async def generate(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """Pass the requests of one caller on, each to the next replica, and the answers back."""
        token, address = transport.token_of(context.invocation_metadata()), context.peer()

        async def answer(asked: ServedRequest) -> None:
            await self._answer(asked, token, address)

        serving = frames.serve(requests, answer, idle_seconds=IDLE_SECONDS, limit=MAX_REQUESTS)
        async with wire.answering(context), contextlib.aclosing(serving) as answers:
            with self.counted(token):
                async for frame in answers:
                    yield frame

    @contextlib.contextmanager
    def counted(self, token: str) -> Iterator[bool]:
        """Count a call while it is open; yield whether it is a guest's. Raises QueueFullError when guests have many."""
        is_guest = self._access.is_guest(token)
        if is_guest and self.guest_calls >= self._most_guest_calls:
            what = f"{self.guest_calls} calls are open, and limits.guest_calls={self._most_guest_calls} are allowed"
            raise self._located(QueueFullError(f"{what}; try again later"))
        self.guest_calls += is_guest
        try:
            yield is_guest
        finally:
            self.guest_calls -= is_guest

    async def _answer(self, asked: ServedRequest, token: str, address: str) -> None:
        """See to one request, as long as its caller waits."""
        if not self._access.admits(Method.GENERATE, token):  # no more: the stream is older than the tokens
            raise AuthenticationError("the token is missing, wrong, or not good for this call")
        is_guest = self._access.is_guest(token)
        if is_guest:
            self._of_guests.add(asked)
        try:
            async with asyncio.timeout(asked.timeout) as scope:
                await self._relay(asked, f"{GUEST if is_guest else OWNER} {address}")
        except TimeoutError as error:
            if isinstance(error, MIIError) or not scope.expired():
                raise
            raise self._late() from None
        finally:
            self._of_guests.discard(asked)

    async def _relay(self, asked: ServedRequest, caller: str) -> None:
        """Pass a caller's request to the next replica, and on from there while replicas are lost."""
        if self._ending.has_begun:
            raise await self._stopping("is ending")
        is_guest = asked in self._of_guests
        try:
            if is_guest:
                await self.pace.keep(len(asked.payload))
            await self._live()
            replica = self._router.next(BatchPosition.parse(asked.position))
        except MIIError as error:
            raise self._located(error) from None
        until, refusal = self._full.get(replica.index, (0.0, ""))
        if is_guest and time.monotonic() < until:
            raise self._located(QueueFullError(refusal), replica)
        try:
            request = _Request(asked, caller)
        except InvalidRequestError as error:
            raise self._located(error, replica) from None
        self.resumed[replica.index] += request.is_resumed
        try:
            while True:
                try:
                    with replica.request(request.payload_for(replica.index), request.take) as ended:
                        await ended
                    return
                except LostError as lost:
                    if lost.is_of_connection:  # before the rank's supervisor could report the end of its engine
                        self._on_broken(replica.index, replica.epoch, "its connection broke")
                except MIIError as error:
                    if is_guest and isinstance(error, QueueFullError):
                        self._full[replica.index] = time.monotonic() + FULL_SECONDS, str(error)
                    raise self._located(error, replica) from None
                if request.ended:
                    return
                replica = await self._next(request, replica)
        finally:
            request.tried.set()

    def cancel_guests(self) -> None:
        """Cancel all requests that guests have in hand."""
        for asked in self._of_guests.copy():
            asked.fail(self._located(RequestCancelledError("the owner has taken the guests' token back")))

    async def _next(self, request: _Request, lost: ReplicaConnection) -> ReplicaConnection:
        """Return the replica where a request goes on. Raises the error that ends it if there is none."""
        what = f"lost replica {lost.index} on {lost.host} with the request in flight"
        if self._ending.has_begun:
            raise await self._stopping("has ended", lost)
        request.move()
        self._note_loss(request, lost)
        if request.losses >= SUSPECT_LOSSES and request.is_alone and self._explains_losses(request):
            self._explained |= request.lost
            raise self._given_up(
                f"{what}, the second in a row before it gave a token: the request may be the reason", lost
            )
        if request.migrations > self._limit:
            raise self._given_up(f"{what}, and migration_limit={self._limit} lets it move no more", lost)
        try:
            await self._live()
            if request.losses:
                await self._take_turn(request)
                await self._live()
            replica = self._router.idlest()
        except UnavailableError:
            raise self._given_up(
                f"{what}, and no other could take it within hold_seconds={self._hold:g}", lost
            ) from None
        except DeploymentStoppingError as error:
            raise self._located(error, lost) from None
        self.migrations[lost.index] += 1
        return replica

    def _note_loss(self, request: _Request, lost: ReplicaConnection) -> None:
        now, replica = time.monotonic(), (lost.index, lost.epoch)
        request.lost.add(replica)
        self._losses.setdefault(replica, now)
        self._losses = {
            each: at for each, at in self._losses.items() if at > now - RECENT_SECONDS and each not in self._explained
        }

    def _explains_losses(self, request: _Request) -> bool:
        """Whether it was in hand where any replica was lost of late, and no other was found to be the reason."""
        return request.lost >= self._losses.keys() and request.lost.isdisjoint(self._explained)

    async def _take_turn(self, suspect: _Request) -> None:
        """Wait until the suspects before this one have a token, or have had the time for it."""
        async with self._suspects:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TRIAL_SECONDS * 2 ** min(suspect.losses - 1, DOUBLINGS)):
                    for other in self._on_trial:
                        await other.tried.wait()
            self._on_trial = [other for other in self._on_trial if not other.tried.is_set()]
            self._on_trial.append(suspect)
            suspect.tried = asyncio.Event()
            for each in self._on_trial:
                each.is_alone = len(self._on_trial) == 1

    async def _live(self) -> None:
        """Wait for a live replica, or for the time that a request is held to be over.

        Raises DeploymentStoppingError when the deployment ends meanwhile.
        """
        if self._router.live or not self._hold:
            return
        waiting = [asyncio.create_task(coroutine) for coroutine in (self._router.wait(), self._ending.wait())]
        try:
            await asyncio.wait(waiting, timeout=self._hold, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        if self._ending.has_begun:
            raise await self._stopping("has ended")

    def passing(self, method: Method) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Return a handler that passes calls of a method to any replica, and the answers back."""

        async def ask(payload: bytes, context: Context) -> bytes:
            token = transport.token_of(context.invocation_metadata())
            async with wire.answering(context):
                with self.counted(token) as is_guest:
                    wire.check_size(len(payload))
                    passed = self._pass_in_turn if is_guest else self._pass
                    return await passed(method, payload, context)

        return grpc.unary_unary_rpc_method_handler(ask)

    async def _pass_in_turn(self, method: Method, payload: bytes, context: Context) -> bytes:
        """Pass a guest's call on, once those before it have been answered, and a rest is over."""
        await self.pace.keep(len(payload))
        await self._live()  # in nobody's turn
        await self._guests_turn.acquire()
        began = time.monotonic()
        try:
            return await self._pass(method, payload, context)
        finally:
            rest = min(GUESTS_REST * (time.monotonic() - began), MOST_REST)
            asyncio.get_running_loop().call_later(rest, self._guests_turn.release)

    async def _pass(self, method: Method, payload: bytes, context: Context) -> bytes:
        """Pass a call to any replica, and to another when that one is lost."""
        while True:
            try:
                await self._live()
                replica = self._router.any()
                return await replica.ask(method, payload, context.time_remaining())
            except grpc.aio.AioRpcError as failure:
                self._check_lost(failure, replica)
            except grpc.aio.UsageError:
                pass
            except asyncio.CancelledError:
                if transport.is_being_cancelled():
                    raise
            except MIIError as error:
                raise self._located(error) from None

    def _check_lost(self, failure: grpc.aio.AioRpcError, replica: ReplicaConnection) -> None:
        """Raise the error of a call that failed for another reason than that its replica is lost."""
        if wire.is_lost(failure):  # before the rank's supervisor could report the end of its engine
            self._on_broken(replica.index, replica.epoch, "its connection broke")
        elif not wire.is_interrupted(failure):  # which is what happens to the calls of a lost replica
            error = wire.error_of(failure)
            raise self._late() if isinstance(error, RequestTimeoutError) else self._located(error, replica) from None

    def _late(self) -> MIIError:
        return self._located(RequestTimeoutError("the caller's timeout passed before the answer was complete"))

    async def _stopping(self, verb: str, replica: ReplicaConnection | None = None) -> MIIError:
        await self._ending.settled()
        words = self._says(f"{verb} ({self._ending.reason})")
        return self._located(DeploymentStoppingError(words, comes_back=self._ending.comes_back), replica)

    def _given_up(self, what: str, replica: ReplicaConnection) -> MIIError:
        """Count a request as lost, and return the error that ends it."""
        self.lost[replica.index] += 1
        return self._located(ReplicaLostError(self._says(what)), replica)

    def _located(self, error: MIIError, replica: ReplicaConnection | None = None) -> MIIError:
        """Return a request's error, with the deployment and the replica that it concerns."""
        if isinstance(error, RequestError):
            error.deployment_name = self._deployment_name
            if replica is not None:
                error.replica, error.host = replica.index, replica.host
        return error

    def _says(self, predicate: str) -> str:
        return f"deployment '{self._deployment_name}' {predicate}"


class _Request:
    """A request in flight: the message that started it, and what has come of it.

    Attributes:
        migrations: how often it went on at another replica.
        losses: how many replicas in a row were lost before they gave it a token.
        lost: all that were lost with it in hand, by index and epoch.
        is_proven: whether the replica that has it has given it a token.
        tried: set once that is known, or it has ended.
        is_alone: whether no other suspect was tried beside it.
        is_resumed: whether another balancer had it before.
    """

    def __init__(self, asked: ServedRequest, caller: str) -> None:
        """Take a request as it comes. Raises InvalidRequestError when it is none."""
        self._asked = asked
        wire.check_size(len(asked.payload))
        self._message = wire.parse_request(asked.payload)
        params = wire.unpack_params(self._message)
        if params.seed is None:  # another replica is to go on with what this one draws
            self._message.params.seed = new_seed()
        # Whatever the caller says.
        self._message.admitted, self._message.caller = False, caller
        self._received = Received(params.num_return_sequences, wire.get_resume(self._message))
        self._served_by = b""
        self.migrations = self.losses = 0
        self.lost: set[tuple[int, int]] = set()
        self.is_proven = self.is_alone = False
        self.is_resumed = bool(self._message.resume)
        self.tried = asyncio.Event()

    def payload_for(self, replica: int) -> bytes:
        """Return the message for the replica that gets it now."""
        self._served_by = wire.pack_server(replica, self.migrations)
        return self._message.SerializeToString()

    @property
    def ended(self) -> bool:
        """Whether its answers are complete."""
        return self._received.ended

    def take(self, chunk: bytes) -> None:
        """Note a piece from the replica, and pass it on."""
        message = pb.GenerateChunk.FromString(chunk)
        self._received.add(message.index, message.token_ids, "".join(message.text), bool(message.finish_reason))
        self.is_proven, self.losses = True, 0
        self.tried.set()
        self._asked.send(message.index, chunk + self._served_by)

    def move(self) -> None:
        """Let it go on from here: the replica that had it is lost."""
        self.tried.set()
        self.migrations += 1
        self.losses += not self.is_proven
        self.is_proven = False
        self._message.admitted = True
        wire.set_resume(self._message, self._received.resume)
