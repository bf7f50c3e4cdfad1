"""One request, on its way through the balancer: its bytes pass unread to a replica, and the answer's come back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc.aio

from mii_hpc.errors import (
    DeploymentStoppingError,
    InvalidRequestError,
    MIIError,
    ReplicaLostError,
    RequestCancelledError,
    RequestError,
    RequestTimeoutError,
)
from mii_hpc.job.balancer.connection import ReplicaConnection
from mii_hpc.job.balancer.lifetime import Ending
from mii_hpc.job.balancer.router import Router
from mii_hpc.rpc import transport, wire
from mii_hpc.rpc.wire import BatchPosition, Context, Method

FIRST_MESSAGE_SECONDS = 30.0
"""A call that has sent no request by then is ended."""


class Relay:
    """Passes requests to replicas.

    `on_broken` is called with a replica's index, its epoch and a reason when the connection to it broke; `is_guest`
    tells of a token whether it is the guests'.
    """

    def __init__(
        self,
        deployment_name: str,
        router: Router,
        ending: Ending,
        on_broken: Callable[[int, int, str], None],
        is_guest: Callable[[str], bool],
    ) -> None:
        self._deployment_name, self._is_guest = deployment_name, is_guest
        self._of_guests: dict[Any, bool] = {}
        """The guests' calls in flight, and whether they were cancelled."""
        self._router, self._ending, self._on_broken = router, ending, on_broken

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
            raise self._located(DeploymentStoppingError(self._says(f"is ending ({self._ending.reason})")))
        try:
            replica = self._router.next(_position(context))
        except MIIError as error:
            raise self._located(error) from None
        call = None
        try:
            try:
                payload = await asyncio.wait_for(anext(requests, None), FIRST_MESSAGE_SECONDS)
            except TimeoutError:
                late = f"the call has had no request within {FIRST_MESSAGE_SECONDS:.0f} s"
                raise self._located(InvalidRequestError(late)) from None
            if payload is None:
                raise self._located(InvalidRequestError("the call has ended without a request"))
            with replica.request(payload, context.time_remaining()) as call:
                if self._is_guest(transport.token_of(context.invocation_metadata())):
                    self._of_guests[call] = False
                await context.send_initial_metadata(((wire.REPLICA_KEY, str(replica.index)),))
                async for chunk in call:
                    yield chunk
        except grpc.aio.AioRpcError as failure:
            raise self._error_of(failure, replica) from None
        except grpc.aio.UsageError:  # lost, and its connection closed, since it was chosen
            raise self._interrupted(replica) from None
        except asyncio.CancelledError:
            # Cancelled by us, because the replica is lost or the time to drain is over; or by the client.
            if transport.is_being_cancelled():
                raise
            if self._of_guests.get(call):
                raise self._located(RequestCancelledError("the owner has taken the guests' token back")) from None
            raise self._interrupted(replica) from None
        finally:
            self._of_guests.pop(call, None)

    def cancel_guests(self) -> None:
        """Cancel all requests that guests have in hand."""
        for call in self._of_guests:
            self._of_guests[call] = True
            call.cancel()

    def passing(self, method: Method) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Return a handler that passes calls of a method to any replica, and the answers back."""

        async def ask(payload: bytes, context: Context) -> bytes:
            async with wire.answering(context):
                try:
                    replica = self._router.any()
                    return await replica.ask(method, payload, context.time_remaining())
                except grpc.aio.AioRpcError as failure:
                    raise self._error_of(failure, replica) from None
                except MIIError as error:
                    raise self._located(error) from None

        return grpc.unary_unary_rpc_method_handler(ask)

    def _error_of(self, failure: grpc.aio.AioRpcError, replica: ReplicaConnection) -> MIIError:
        if wire.is_lost(failure):  # before the rank's supervisor could report the end of its engine
            self._on_broken(replica.index, replica.epoch, "its connection broke")
            return self._interrupted(replica)
        error = wire.error_of(failure)
        if isinstance(error, RequestTimeoutError):
            error = RequestTimeoutError("the caller's timeout passed before the answer was complete")
        return self._located(error, replica)

    def _interrupted(self, replica: ReplicaConnection) -> MIIError:
        if self._ending.has_begun:
            return self._located(DeploymentStoppingError(self._says(f"has ended ({self._ending.reason})")), replica)
        message = f"lost replica {replica.index} on {replica.host} with the request in flight"
        return self._located(ReplicaLostError(self._says(message)), replica)

    def _located(self, error: MIIError, replica: ReplicaConnection | None = None) -> MIIError:
        """Return a request's error, with the deployment and the replica that it concerns."""
        if isinstance(error, RequestError):
            error.deployment_name = self._deployment_name
            if replica is not None:
                error.replica, error.host = replica.index, replica.host
        return error

    def _says(self, predicate: str) -> str:
        return f"deployment '{self._deployment_name}' {predicate}"


def _position(
    context: Context,
) -> BatchPosition | None:
    named = next((value for key, value in context.invocation_metadata() or () if key == wire.POSITION_KEY), None)
    return BatchPosition.parse(named) if isinstance(named, str) else None
