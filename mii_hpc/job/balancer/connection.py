"""The connection of the balancer to one replica."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Self

import grpc.aio

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc._proto import mii_hpc_pb2_grpc as pb_grpc
from mii_hpc.config import GenerateParamsConfig
from mii_hpc.deployments.credentials import ClientCredentials
from mii_hpc.errors import UnavailableError
from mii_hpc.generation import GenerationRequest
from mii_hpc.job.balancer.membership import Replica
from mii_hpc.rpc import transport, wire
from mii_hpc.rpc.frames import ClosedError, LostError, RequestStream, StreamGroup

LOAD_SECONDS = 2.0
"""A replica's load is left out of the status when the replica does not answer within this time."""
TRIAL_SECONDS = 120.0
"""A replica's first generation may take this long; it warms up what is compiled on first use."""


class ReplicaConnection:
    """The connection to the leader of a replica that takes requests."""

    def __init__(
        self,
        index: int,
        epoch: int,
        host: str,
        channel: grpc.aio.Channel,
        keys: ClientCredentials,
        group: StreamGroup | None = None,
    ) -> None:
        self.index, self.epoch, self.host = index, epoch, host
        self._group = group
        self._channel = channel
        # Now: gRPC crashes on a stub that is made of a closed channel.
        self._engine = pb_grpc.EngineStub(channel)
        self._generate: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(wire.Method.GENERATE)
        self._authorization = transport.authorization(keys)
        self._stream: RequestStream | None = None
        self._is_closed = False

    @classmethod
    async def open(
        cls, replica: Replica, address: str, keys: ClientCredentials, group: StreamGroup | None = None
    ) -> Self:
        """Connect to a replica, and send a small request through it; its stream is to be one of a group.

        Raises the request's error, or UnavailableError when there is no answer from the address.
        """
        channel = transport.open_channel(address, keys)
        connection = cls(replica.index, replica.epoch, replica.host, channel, keys, group)
        params = GenerateParamsConfig(max_new_tokens=2, do_sample=False, ignore_eos=True)
        trial = wire.pack_request(GenerationRequest("trial", "Hello", params)).SerializeToString()
        try:
            async with asyncio.timeout(TRIAL_SECONDS):
                await connection._channel.channel_ready()
                with connection.request(trial, lambda chunk: None) as ended:
                    await ended
        except BaseException as failure:
            await connection.close()
            if isinstance(failure, LostError) and failure.failure is not None:
                raise wire.error_of(failure.failure) from failure
            if isinstance(failure, LostError | TimeoutError):
                raise UnavailableError(f"no answer from {address} within {TRIAL_SECONDS:.0f} s") from failure
            raise
        return connection

    @property
    def in_flight(self) -> int:
        """How many requests have been passed to the replica and have not ended."""
        return len(self._stream) if self._stream is not None else 0

    def request(self, payload: bytes, take: Callable[[bytes], None]) -> AbstractContextManager[asyncio.Future[None]]:
        """Send a request, as RequestStream.request() does. Raises ClosedError when the connection is closed."""
        if self._is_closed:
            raise ClosedError
        if self._stream is None or self._stream.has_ended:  # gRPC may end one of its own accord
            self._stream = RequestStream(self._generate, self._authorization, group=self._group)
        return self._stream.request(payload, take)

    async def ask(self, method: wire.Method, payload: bytes, timeout: float | None) -> bytes:
        """Call a method of Inference that is no request, and return its answer."""
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(method)
        return await call(payload, timeout=timeout, metadata=self._authorization)

    async def load(self) -> pb.LoadResponse | None:
        """Return the engine's load; None when it does not answer at once."""
        try:
            return await self._engine.Load(pb.LoadRequest(), timeout=LOAD_SECONDS, metadata=self._authorization)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):
            return None
        except asyncio.CancelledError:
            if transport.is_being_cancelled():
                raise
            return None  # the replica was lost meanwhile

    def cancel_requests(self) -> None:
        """Cancel all requests in flight, here and at the replica, and take no more."""
        self._is_closed = True
        if self._stream is not None:
            self._stream.close()

    async def close(self) -> None:
        """Close the connection."""
        self.cancel_requests()
        await self._channel.close()
