"""One request, on its way through the balancer: to a replica, and on to another when that one is lost."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace

import grpc.aio

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.config import MIIConfig
from mii_hpc.errors import (
    DeploymentStoppingError,
    InvalidRequestError,
    MIIError,
    ReplicaLostError,
    RequestCancelledError,
    RequestError,
    RequestTimeoutError,
    UnavailableError,
)
from mii_hpc.generation import GUEST, OWNER, Received, Response, joined, new_seed
from mii_hpc.job.balancer.connection import ReplicaConnection
from mii_hpc.job.balancer.ending import Ending
from mii_hpc.job.balancer.router import Router
from mii_hpc.rpc import transport, wire
from mii_hpc.rpc.wire import BatchPosition, Context, Method

SUSPECT_LOSSES = 2
"""A request is given up when so many replicas in a row were lost before they gave it a token: it may be the cause."""
TRIAL_SECONDS = 1.0
"""A suspect has this long to get its first token before the next is tried."""

FIRST_MESSAGE_SECONDS = 30.0
"""A call that has sent no request by then is ended."""


class Relay:
    """Passes requests to replicas; when one is lost, what it had in hand goes on at another.

    A request moves with what has come of it, so that its answer is what it would have been. One of which a lost replica
    had not given a token yet may be what killed it: such requests are tried one after the other, so that one that kills
    engines is found out at its second, and no other is blamed for it.

    `on_broken` is called with a replica's index, its epoch and a reason when the connection to it broke; `is_guest`
    tells of a token whether it is the guests'.

    Attributes:
        migrations: how many requests went on elsewhere because a replica was lost, by its index.
        resumed: how many came because their balancer was lost or replaced, by the replica where they went on.
        lost: how many were given up because a replica was lost, by its index.
    """

    def __init__(
        self,
        config: MIIConfig,
        router: Router,
        ending: Ending,
        on_broken: Callable[[int, int, str], None],
        is_guest: Callable[[str], bool],
    ) -> None:
        self._is_guest = is_guest
        self._of_guests: set[_Request] = set()
        self._deployment_name = config.deployment_name
        self._limit, self._hold = config.migration_limit, config.hold_seconds
        self._router, self._ending, self._on_broken = router, ending, on_broken
        self._suspects = asyncio.Lock()
        self._tried = asyncio.Event()
        self._tried.set()
        self.migrations: collections.Counter[int] = collections.Counter()
        self.resumed: collections.Counter[int] = collections.Counter()
        self.lost: collections.Counter[int] = collections.Counter()

    async def generate(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """Pass one request to the next replica and its answer back.

        It takes the requests as a stream, of one, because such a handler runs as soon as a call arrives: so requests
        take their turns in the order of the client's calls, however long their messages are.
        """
        async with wire.answering(context), contextlib.aclosing(self._relayed(requests, context)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _relayed(self, requests: AsyncIterator[bytes], context: Context) -> AsyncGenerator[bytes]:
        if self._ending.has_begun:
            raise await self._stopping("is ending")
        try:
            await self._live()
            replica = self._router.next(_position(context))
        except MIIError as error:
            raise self._located(error) from None
        try:
            payload = await asyncio.wait_for(anext(requests, None), FIRST_MESSAGE_SECONDS)
        except TimeoutError:
            late = f"the call has had no request within {FIRST_MESSAGE_SECONDS:.0f} s"
            raise self._located(InvalidRequestError(late)) from None
        if payload is None:
            raise self._located(InvalidRequestError("the call has ended without a request"))
        try:
            request = _Request(payload)
        except InvalidRequestError as error:
            raise self._located(error, replica) from None
        self.resumed[replica.index] += request.is_resumed
        await context.send_initial_metadata(((wire.REPLICA_KEY, str(replica.index)),))
        is_guest = self._is_guest(transport.token_of(context.invocation_metadata()))
        request.ask_for(GUEST if is_guest else OWNER, context.peer())
        if is_guest:
            self._of_guests.add(request)
        try:
            while True:
                try:
                    with replica.request(request.payload, context.time_remaining()) as call:
                        request.call = call
                        async for chunk in call:
                            if (passed := request.take(chunk, replica.index)) is not None:
                                yield passed
                    return
                except grpc.aio.AioRpcError as failure:
                    self._check_lost(failure, replica)
                except grpc.aio.UsageError:  # lost, and its connection closed, since it was chosen
                    request.is_proven = True
                except asyncio.CancelledError:
                    # Cancelled by us, because the replica is lost or the time to drain is over; or by the client.
                    if transport.is_being_cancelled():
                        raise
                if request.ended:
                    return
                if not request.is_withdrawn:
                    replica = await self._next(request, replica)
                if request.is_withdrawn:
                    raise self._located(RequestCancelledError("the owner has taken the guests' token back"), replica)
        finally:
            self._of_guests.discard(request)
            request.tried.set()

    def cancel_guests(self) -> None:
        """Cancel all requests that guests have in hand."""
        for request in self._of_guests:
            request.is_withdrawn = True
            if request.call is not None:
                request.call.cancel()

    async def _next(self, request: _Request, lost: ReplicaConnection) -> ReplicaConnection:
        """Return the replica where a request goes on. Raises the error that ends it if there is none."""
        what = f"lost replica {lost.index} on {lost.host} with the request in flight"
        if self._ending.has_begun:
            raise await self._stopping("has ended", lost)
        request.move()
        if request.losses == SUSPECT_LOSSES:
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

    async def _take_turn(self, suspect: _Request) -> None:
        """Wait until the suspect before this one has a token, or has had the time for it."""
        async with self._suspects:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TRIAL_SECONDS):
                    await self._tried.wait()
            self._tried = suspect.tried = asyncio.Event()

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
            async with wire.answering(context):
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

        return grpc.unary_unary_rpc_method_handler(ask)

    def _check_lost(self, failure: grpc.aio.AioRpcError, replica: ReplicaConnection) -> None:
        """Raise the error of a call that failed for another reason than that its replica is lost."""
        if wire.is_lost(failure):  # before the rank's supervisor could report the end of its engine
            self._on_broken(replica.index, replica.epoch, "its connection broke")
        elif not wire.is_interrupted(failure):  # which is what happens to the calls of a lost replica
            error = wire.error_of(failure)
            if isinstance(error, RequestTimeoutError):
                error = RequestTimeoutError("the caller's timeout passed before the answer was complete")
            raise self._located(error, replica) from None

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
        is_proven: whether the replica that has it has given it a token.
        tried: set once that is known, or it has ended.
        call: the latest of those to replicas.
        is_withdrawn: whether it may go on nowhere.
        is_resumed: whether another balancer had it before.
    """

    def __init__(self, payload: bytes) -> None:
        """Take a GenerateRequest as bytes. Raises InvalidRequestError when it is none."""
        self._message = wire.parse_request(payload)
        params = wire.unpack_params(self._message)
        if params.seed is None:  # another replica is to go on with what this one draws
            self._message.params.seed = new_seed()
        self._passes_pieces = params.stream or self._message.report
        self._message.report = True
        self._message.admitted = False  # whatever the caller says
        self._received = Received(params.num_return_sequences, wire.get_resume(self._message))
        self._pieces: list[Response] = []
        self.migrations = self.losses = 0
        self.is_proven = self.is_withdrawn = False
        self.is_resumed = bool(self._message.resume)
        self.tried = asyncio.Event()
        self.call: grpc.aio.UnaryStreamCall[bytes, bytes] | None = None

    def ask_for(self, role: str, address: str) -> None:
        """Tell replicas for whom this is."""
        self._message.caller = f"{role} {address}"

    @property
    def payload(self) -> bytes:
        """The message for the replica that gets it now."""
        return self._message.SerializeToString()

    @property
    def ended(self) -> bool:
        """Whether its answers are complete."""
        return self._received.ended

    def take(self, chunk: bytes, replica: int) -> bytes | None:
        """Note a piece from a replica; return what is to be passed on now.

        That is the piece where the caller takes pieces, and else the whole answer once it has ended.
        """
        message = pb.GenerateChunk.FromString(chunk)
        self._received.add(message.index, message.token_ids, message.text, bool(message.finish_reason))
        self.is_proven, self.losses = True, 0
        self.tried.set()
        if self._passes_pieces and not self.migrations:
            return chunk
        piece = wire.unpack_response(message)
        if not self._passes_pieces:
            self._pieces.append(piece)
            if not piece.ended:
                return None
            (piece,) = joined(part for part in self._pieces if part.index == piece.index)
            self._pieces = [part for part in self._pieces if part.index != piece.index]
        return wire.encode_response(replace(piece, replica=replica, migrations=self.migrations))

    def move(self) -> None:
        """Let it go on from here: the replica that had it is lost."""
        self.tried.set()
        self.migrations += 1
        self.losses += not self.is_proven
        self.is_proven = False
        self._message.admitted = True
        wire.set_resume(self._message, self._received.resume)


def _position(
    context: Context,
) -> BatchPosition | None:
    named = next((value for key, value in context.invocation_metadata() or () if key == wire.POSITION_KEY), None)
    return BatchPosition.parse(named) if isinstance(named, str) else None
