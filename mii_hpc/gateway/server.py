"""The gateway as a server: where it listens, and whom it lets in."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import resource
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mii_hpc.clients.asynchronous import AsyncMIIClient
from mii_hpc.config import MIIConfig
from mii_hpc.deployments.lookup import Home
from mii_hpc.errors import ConfigError, DeploymentNotFoundError, RegistryError
from mii_hpc.gateway.app import Gateway
from mii_hpc.gateway.model import ServedModel
from mii_hpc.rpc import transport

TOKEN_SECONDS = 1.0
"""How long a token is remembered after it was read from its file; so soon a rotated one opens nothing."""
REQUEST_SECONDS = 10.0
"""A connection without a request, or one whose first lines do not come, is closed after this: it needs no token, and
there is room for so many."""
HANDSHAKE_SECONDS = 5.0
STOP_SECONDS = 3
"""How long requests may go on when the gateway is told to end."""


@dataclass(frozen=True)
class Listening:
    """Where to listen: at a host and port, or at a Unix socket's path; with TLS where there are key and certificate."""

    host: str = "127.0.0.1"
    port: int = 8000
    path: Path | None = None
    key: Path | None = None
    certificate: Path | None = None


class Keys:
    """The tokens that open the gateway, read anew when they may have changed."""

    def __init__(self, read: Callable[[], Iterable[str]]) -> None:
        self._read = read
        self._tokens: tuple[str, ...] = ()
        self._until = float("-inf")

    def admits(self, token: str) -> bool:
        """Whether a token opens the gateway: the last known does while there is no deployment to be opened."""
        if time.monotonic() > self._until:
            try:
                self._tokens = tuple(self._read())
            except DeploymentNotFoundError:
                pass
            except RegistryError:
                self._tokens = ()
            self._until = time.monotonic() + TOKEN_SECONDS
        return any(transport.same_token(token, own) for own in self._tokens)


class Server(uvicorn.Server):
    """A server that says where it listens."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[str], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where. Raises ConfigError when the port cannot be had."""
        if self.config.uds:
            await super().startup(sockets)
            self._on_start(self.config.uds)
        else:
            with _short_handshakes() if self.config.is_ssl else contextlib.nullcontext():
                await super().startup([_listening(self.config.host, self.config.port)])
            scheme = "https" if self.config.is_ssl else "http"
            port = self.servers[0].sockets[0].getsockname()[1]
            self._on_start(f"{scheme}://{self.config.host}:{port}")


class Protocol(H11Protocol):
    """A connection that is closed when there is no request on it for REQUEST_SECONDS, whatever else is sent."""

    _closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take what comes."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        super().connection_lost(exc)
        self._watch()

    def _watch(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._closing is not None and (answering or self.transport.is_closing()):
            self._closing.cancel()
            self._closing = None
        elif self._closing is None and not answering and not self.transport.is_closing():
            self._closing = self.loop.call_later(REQUEST_SECONDS, self.transport.close)


@contextlib.contextmanager
def _short_handshakes() -> Iterator[None]:
    """Let what listens from now on give up a TLS handshake soon; uvicorn has no option for it."""
    loop = asyncio.get_running_loop()
    create_server = functools.partial(loop.create_server, ssl_handshake_timeout=HANDSHAKE_SECONDS)
    with contextlib.ExitStack() as undo:
        undo.callback(delattr, loop, "create_server")
        setattr(loop, "create_server", create_server)  # noqa: B010 (mypy forbids the plain way)
        yield


def _listening(host: str, port: int) -> socket.socket:
    # The protocol is named for asyncio, which else lets the kernel hold small answers back (Nagle), for 40 ms.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()
        return listening
    except OSError as error:
        listening.close()
        why = os.strerror(error.errno or 0)
        raise ConfigError(f"port={port}: {host} cannot listen there: {why}; 0 takes any free one") from None


@contextlib.contextmanager
def _as_many_files_as_possible() -> Iterator[None]:
    """Let slow and idle connections, however many, not take the place of others."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def create_server(
    name: str, home: Home, listening: Listening, on_start: Callable[[str], None], keys: Keys | None = None
) -> Server:
    """Return a server for the deployment of that name, wherever it runs; it follows the name through restarts.

    `on_start` is told the address, once it listens. Without `keys`, the token is the one that opens the deployment to
    this user.
    """
    client = AsyncMIIClient(MIIConfig(deployment_name=name, home=home.path), home=home)
    keys = keys or Keys(lambda: [home.get(name).credentials.token])
    config = uvicorn.Config(
        Gateway(ServedModel(client, home), keys.admits).app(),
        host=listening.host,
        port=listening.port,
        uds=str(listening.path) if listening.path else None,
        ssl_keyfile=listening.key,
        ssl_certfile=listening.certificate,
        log_config=None,
        log_level="warning",  # of uvicorn's own; who starts it says where it listens
        access_log=False,
        server_header=False,
        http=Protocol,
        lifespan="off",
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    return Server(config, on_start)


def serve(
    name: str, home: Home, listening: Listening, on_start: Callable[[str], None], keys: Keys | None = None
) -> None:
    """Serve until SIGINT or SIGTERM. See create_server()."""
    with _as_many_files_as_possible():
        create_server(name, home, listening, on_start, keys).run()
