"""The connection of the balancer to one replica."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Self

import grpc.aio

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc._proto import mii_hpc_pb2_grpc as pb_grpc
from mii_hpc.config import GenerateParamsConfig
from mii_hpc.deployments.credentials import ClientCredentials
from mii_hpc.generation import GenerationRequest
from mii_hpc.job.balancer.membership import Replica
from mii_hpc.rpc import transport, wire

LOAD_SECONDS = 2.0
"""A replica's load is left out of the status when the replica does not answer within this time."""
TRIAL_SECONDS = 120.0
"""A replica's first generation may take this long; it warms up what is compiled on first use."""


class ReplicaConnection:
    """The connection to the leader of a replica that takes requests."""

    def __init__(self, index: int, epoch: int, host: str, channel: grpc.aio.Channel, keys: ClientCredentials) -> None:
        self.index, self.epoch, self.host = index, epoch, host
        self._channel = channel
        self._engine = pb_grpc.EngineStub(channel)  # now: gRPC crashes on one that is made of a closed channel
        self._authorization = transport.authorization(keys)
        self._in_flight: set[grpc.aio.UnaryStreamCall[bytes, bytes]] = set()
        self._holding: grpc.aio.StreamStreamCall[bytes, bytes] | None = None

    @classmethod
    async def open(cls, replica: Replica, address: str, keys: ClientCredentials) -> Self:
        """Connect to a replica, and send a small request through it.

        Raises the request's error, or UnavailableError when there is no answer from the address.
        """
        connection = cls(replica.index, replica.epoch, replica.host, transport.open_channel(address, keys), keys)
        params = GenerateParamsConfig(max_new_tokens=2, do_sample=False, ignore_eos=True)
        try:
            call = pb_grpc.InferenceStub(connection._channel).Generate(
                wire.pack_request(GenerationRequest("trial", "Hello", params)),
                timeout=TRIAL_SECONDS,
                metadata=connection._authorization,
                wait_for_ready=True,
            )
            async for _ in call:
                pass
            connection._hold()
        except BaseException as failure:
            await connection.close()
            if isinstance(failure, grpc.aio.AioRpcError):
                raise wire.error_of(failure) from failure
            raise
        return connection

    def _hold(self) -> None:
        """Begin a call that asks for nothing: a server closes an idle connection, and may have no room for another."""
        call: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(wire.Method.LOAD)
        self._holding = call(metadata=self._authorization)

    @property
    def in_flight(self) -> int:
        """How many requests have been passed to the replica and have not ended."""
        return len(self._in_flight)

    @contextlib.contextmanager
    def request(self, payload: bytes, timeout: float | None) -> Iterator[grpc.aio.UnaryStreamCall[bytes, bytes]]:
        """Send a request, a GenerateRequest as bytes; yield the call, whose chunks are its answer.

        The call is cancelled on exit. Raises grpc.aio.UsageError when the connection is closed.
        """
        generate: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(wire.Method.GENERATE)
        call = generate(payload, timeout=timeout, metadata=self._authorization)
        self._in_flight.add(call)
        try:
            yield call
        finally:
            self._in_flight.discard(call)
            call.cancel()

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
        """Cancel all requests in flight, here and at the replica."""
        for call in list(self._in_flight):
            call.cancel()

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()
