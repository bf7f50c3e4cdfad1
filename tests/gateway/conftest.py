import asyncio
from dataclasses import dataclass

import httpx
import openai
import pytest

from mii_hpc.deployments import credentials
from mii_hpc.deployments.lookup import OwnHome
from mii_hpc.gateway.server import Listening, create_server


@dataclass
class Face:
    """A gateway before a deployment, both in an event loop on a thread of their own."""

    threaded: object
    url: str

    @property
    def token(self):
        return credentials.read_token(self.threaded.deployment.run.owner_token)

    def openai(self, **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": self.token, "max_retries": 0, **options})

    def http(self, **options):
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {self.token}"}, **options)


@pytest.fixture
def start(deploy_in_thread):
    """Start a deployment named "chat" with a gateway; arguments are those of Deployment."""
    stopping = []

    def start(**shape):
        threaded = deploy_in_thread(**{"replica_num": 1, **shape})
        url = threaded.do(listen(threaded.config, stopping))
        stopping[-1] = (threaded, *stopping[-1])
        return Face(threaded, url)

    yield start
    for threaded, server, serving in stopping:
        threaded.do(stop(server, serving))


async def listen(config, stopping):
    address = asyncio.get_running_loop().create_future()
    server = create_server("chat", OwnHome(config.home), Listening(port=0), address.set_result)
    stopping.append((server, asyncio.create_task(server.serve())))
    return await address


async def stop(server, serving):
    server.should_exit = True
    await serving


@pytest.fixture
def face(start):
    """A gateway before one echo engine."""
    return start()


@pytest.fixture
def api(face):
    """The official client of that gateway."""
    with face.openai() as client:
        yield client
