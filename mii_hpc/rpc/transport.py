"""gRPC as this package uses it: TLS with pinned certificates on both sides, a token on every call, and keepalive."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

import grpc
import grpc.aio

from mii_hpc._proto import mii_hpc_pb2_grpc as pb_grpc
from mii_hpc.deployments.credentials import TLS_NAME, ClientCredentials, ServerCredentials
from mii_hpc.rpc.wire import MAX_MESSAGE_BYTES, Context, Method

Request = TypeVar("Request")
Answer = TypeVar("Answer")

MAX_STREAMS_PER_CONNECTION = 128
"""Others wait at the client. All requests of a client share one; who opens streams and resets them as fast as he can
has no more than these in hand here."""
MAX_BYTES = 2 * MAX_MESSAGE_BYTES
"""gRPC's limit: a message of the greatest length fits into a frame that has others already."""
KEEPALIVE_SECONDS = 5
"""A host that does not answer for twice this is gone. A host still answers for a process that is stopped."""
IDLE_SECONDS = 2
"""A connection without a call, or that does not get through TLS, is closed after this.

gRPC cannot close a connection for what its calls show, but one that shows no valid token has no call that lasts.
A client's connection that is closed for idleness comes back with its next call."""

_KEEPALIVE = [
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.http2.max_pings_without_data", 0),
]

Admits = Callable[[str, str], bool]
"""Tells whether a token (second) opens a method (first, by its path)."""
Turn = Callable[[], Awaitable[None]]
"""Waits until a call may begin."""


def open_channel(address: str, credentials: ClientCredentials) -> grpc.aio.Channel:
    """Return a channel to "host:port" that accepts only a server with the deployment's key, and shows its own."""
    return grpc.aio.secure_channel(
        address,
        grpc.ssl_channel_credentials(credentials.certificate, credentials.identity, credentials.identity),
        options=[
            *_KEEPALIVE,
            ("grpc.ssl_target_name_override", TLS_NAME),
            ("grpc.max_send_message_length", MAX_BYTES),
            ("grpc.max_receive_message_length", MAX_BYTES),
            # Deployments come and go at one address; connections are not shared between them.
            ("grpc.use_local_subchannel_pool", 1),
            # Compute nodes reach each other directly, whatever http_proxy says.
            ("grpc.enable_http_proxy", 0),
            ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ],
    )


class Connection:
    """A channel to a balancer, with its stubs: gRPC crashes when one is made of a channel that was closed before."""

    def __init__(self, address: str, credentials: ClientCredentials) -> None:
        self.channel = open_channel(address, credentials)
        self.generate: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self.channel.stream_stream(Method.GENERATE)
        self.inference = pb_grpc.InferenceStub(self.channel)
        self.deployment = pb_grpc.DeploymentStub(self.channel)

    @property
    def is_ready(self) -> bool:
        """Whether it is connected at this moment."""
        return self.channel.get_state() is grpc.ChannelConnectivity.READY


def authorization(credentials: ClientCredentials) -> tuple[tuple[str, str], ...]:
    """Return the metadata that shows the token to a server."""
    return (("authorization", f"Bearer {credentials.token}"),)


def token_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Return the token that a call shows to a server, "" when it shows none."""
    shown = next((value for key, value in metadata or () if key == "authorization"), "")
    return shown.removeprefix("Bearer ") if isinstance(shown, str) else ""


def create_server(admits: Admits, turn: Turn | None = None) -> grpc.aio.Server:
    """Return a server, still without services, that answers only calls that are admitted, each at its `turn`."""
    return grpc.aio.server(
        interceptors=[_Gate(admits, turn)],
        options=[
            *_KEEPALIVE,
            ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 500),
            ("grpc.keepalive_permit_without_calls", 0),
            ("grpc.server_handshake_timeout_ms", int(IDLE_SECONDS * 1000)),
            ("grpc.max_connection_idle_ms", int(IDLE_SECONDS * 1000)),
            ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
            ("grpc.max_send_message_length", MAX_BYTES),
            ("grpc.max_receive_message_length", MAX_BYTES),
        ],
    )


def add_inference(server: grpc.aio.Server, handlers: Mapping[Method, grpc.RpcMethodHandler[bytes, bytes]]) -> None:
    """Let handlers answer the methods of Inference. They get and give bytes, which need not be a message."""
    by_name = {method.rpartition("/")[2]: handler for method, handler in handlers.items()}
    service = Method.GENERATE.split("/")[1]
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, by_name),))


def listen(
    server: grpc.aio.Server,
    address: str,
    credentials: ServerCredentials,
    admitted: Callable[[], bytes] | None = None,
) -> int:
    """Bind a server to "host:port", with TLS, and return the port. Raises OSError when it cannot be bound.

    A connection comes about with clients that have the key of one of the `admitted` certificates (PEM) at that moment;
    without them, with the job's own processes.
    """
    pairs, ranks = [(credentials.key, credentials.certificate)], credentials.certificate
    if admitted is None:
        doors = grpc.ssl_server_credentials(pairs, ranks, require_client_auth=True)
    else:
        doors = _renewed(pairs, admitted)
    try:
        port = server.add_secure_port(address, doors)
    except RuntimeError as error:
        raise OSError(f"{address}: cannot listen: {error}") from error
    if port == 0:
        raise OSError(f"{address}: cannot listen")
    return int(port)


def _renewed(pairs: list[tuple[bytes, bytes]], admitted: Callable[[], bytes]) -> grpc.ServerCredentials:
    """Return credentials that are asked anew for each connection whose certificates they admit."""
    current = admitted()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal current
        before, current = current, admitted()
        return grpc.ssl_server_certificate_configuration(pairs, current) if current != before else None

    configuration = grpc.ssl_server_certificate_configuration(pairs, current)
    return grpc.dynamic_ssl_server_credentials(
        configuration,
        changed,  # type: ignore[arg-type]  # None says that nothing has changed, which the types leave out
        require_client_authentication=True,
    )


def same_token(shown: str, expected: str) -> bool:
    """Compare two tokens in a time that does not depend on where they differ."""
    return hmac.compare_digest(shown.encode(), expected.encode())


def is_being_cancelled() -> bool:
    """Whether the running task is itself cancelled, not just a call that it awaits.

    gRPC raises asyncio.CancelledError for both: also when a call's channel is closed under it.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Gate(grpc.aio.ServerInterceptor):
    """Checks the token before the method is looked up: a call without a valid token is neither decoded nor answered."""

    def __init__(self, admits: Admits, turn: Turn | None) -> None:
        self._admits, self._turn = admits, turn

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Request, Answer] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Request, Answer] | None:
        if self._turn is not None:
            await self._turn()
        if self._admits(handler_call_details.method, token_of(handler_call_details.invocation_metadata)):
            return await continuation(handler_call_details)
        # A stream-stream handler answers calls of every kind, and reads nothing.
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(_requests: Any, context: Context) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing, wrong, or not good for this call")
