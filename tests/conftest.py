import signal

import pytest

from mii_hpc.job import membership
from tests.live import Deployment, InThread

# As from a terminal, also where a shell, nohup, cron or a batch script has started the tests: those have SIGINT
# ignored, which every process that a test starts would inherit. SIGHUP stays as it is, for nohup to mean something.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
    signal.signal(_signum, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())


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
