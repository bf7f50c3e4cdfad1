import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from mii_hpc.config import MIIConfig
from mii_hpc.deployments import credentials
from mii_hpc.deployments.lookup import OwnHome
from mii_hpc.gateway.server import Listening, Server, create_server
from tests.live import InThread
from tests.waiting import PATIENCE

Running = list[tuple[InThread, Server, asyncio.Task[None]]]


@dataclass
class Face:
    """A gateway before a deployment, both in an event loop on a thread of their own."""

    threaded: InThread
    url: str
    server: Server

    @property
    def token(self) -> str:
        return credentials.read_token(self.threaded.deployment.run.owner_token)

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": self.token, "max_retries": 0, **options})

    def http(self, **options: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=self.url, headers=headers, **{"timeout": PATIENCE, **options})

    def get(self, path: str, **options: Any) -> httpx.Response:
        """Ask on a connection of its own, without the token."""
        return httpx.get(f"{self.url}{path}", timeout=PATIENCE, **options)


@pytest.fixture
def start(deploy_in_thread: Callable[..., InThread]) -> Iterator[Callable[..., Face]]:
    """Start a deployment named "chat" with a gateway; arguments are those of Deployment."""
    running: Running = []

    def start(**shape: Any) -> Face:
        threaded = deploy_in_thread(**{"replica_num": 1, **shape})
        server, serving, url = threaded.do(_listen(threaded.config))
        running.append((threaded, server, serving))
        return Face(threaded, url, server)

    yield start
    for threaded, server, serving in running:
        threaded.do(_stop(server, serving))


async def _listen(config: MIIConfig) -> tuple[Server, asyncio.Task[None], str]:
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server = create_server("chat", OwnHome(config.home), Listening(port=0), address.set_result)
    return server, asyncio.create_task(server.serve()), await address


async def _stop(server: Server, serving: asyncio.Task[None]) -> None:
    server.should_exit = True
    await serving


@pytest.fixture
def face(start: Callable[..., Face]) -> Face:
    """A gateway before one echo engine."""
    return start()


@pytest.fixture
def api(face: Face) -> Iterator[openai.OpenAI]:
    """The official client of that gateway."""
    with face.openai() as client:
        yield client
