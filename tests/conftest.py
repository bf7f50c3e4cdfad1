import pytest

from mii_hpc.job.balancer import membership
from tests.live import Deployment, InThread


@pytest.fixture
async def deploy(tmp_path, monkeypatch):
    """Start deployments in the test's event loop; arguments are those of Deployment."""
    monkeypatch.setattr(membership, "REFORM_BACKOFF_SECONDS", (0.0,))
    running = []

    async def start(kind=Deployment, **shape):
        deployment = kind(tmp_path / "home", **shape)
        running.append(deployment)
        return await deployment.start()

    yield start
    for deployment in running:
        await deployment.stop()


@pytest.fixture
def deploy_in_thread(tmp_path, monkeypatch):
    """Start deployments on threads of their own; arguments are those of Deployment."""
    monkeypatch.setattr(membership, "REFORM_BACKOFF_SECONDS", (0.0,))
    running = []

    def start(**shape):
        running.append(InThread(tmp_path / "home", **shape))
        return running[-1]

    yield start
    for deployment in running:
        deployment.stop()


def pytest_addoption(parser):
    parser.addoption("--golden", action="store_true", help="write the golden files anew")
