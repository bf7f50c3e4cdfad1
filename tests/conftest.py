import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mii_hpc.config import MIIConfig, resolve
from mii_hpc.engine.echo import EchoEngine
from mii_hpc.job.balancer import connection, membership
from tests.live import Deployment, InThread
from tests.waiting import PATIENCE

# As from a terminal, also where a shell, nohup, cron or a batch script has started the tests: those have SIGINT
# ignored, which every process that a test starts would inherit. SIGHUP stays as it is, for nohup to mean something.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
    signal.signal(_signum, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())


@pytest.fixture
def paces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Form lost replicas again at once, and wait for what a busy machine is slow to say of a replica's load."""
    monkeypatch.setattr(membership, "REFORM_BACKOFF_SECONDS", (0.0,))
    monkeypatch.setattr(connection, "LOAD_SECONDS", PATIENCE)


@pytest.fixture
async def deploy(tmp_path: Path, paces: None) -> AsyncIterator[Callable[..., Awaitable[Deployment]]]:
    """Start deployments in the test's event loop; arguments are those of Deployment."""
    running: list[Deployment] = []

    async def start(kind: type[Deployment] = Deployment, **shape: Any) -> Deployment:
        deployment = kind(tmp_path / "home", **shape)
        running.append(deployment)
        return await deployment.start()

    yield start
    for deployment in running:
        await deployment.stop()


@pytest.fixture
def deploy_in_thread(tmp_path: Path, paces: None) -> Iterator[Callable[..., InThread]]:
    """Start deployments on threads of their own; arguments are those of Deployment."""
    running: list[InThread] = []

    def start(**shape: Any) -> InThread:
        running.append(InThread(tmp_path / "home", **shape))
        return running[-1]

    yield start
    for deployment in running:
        deployment.stop()


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What this package says; not what asyncio or gRPC say of other tests' objects, whenever those are freed."""
    ours = logging.Filter("mii_hpc")
    caplog.handler.addFilter(ours)
    yield caplog
    caplog.handler.removeFilter(ours)


HELD = 5
"""So many tokens each answer has when it is held."""


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An event for which all answers of echo engines wait once they have a few tokens.

    So what is to happen while requests run does, however slow the machine is.
    """
    gate = threading.Event()
    generate = EchoEngine._generate

    def generate_a_few(engine: EchoEngine, echo: Any, period: int) -> None:
        if gate.is_set() or min(answer.generated for answer in echo.answers) < HELD:
            generate(engine, echo, period)

    monkeypatch.setattr(EchoEngine, "_generate", generate_a_few)
    return gate


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put commands on PATH that answer as the test says: slurm(sbatch="shell script", ...)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)

    def commands(**scripts: str) -> Path:
        for name, script in scripts.items():
            # Aside, since another process may be about to read the one that is there.
            aside = folder / f"{name}.new"
            aside.write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\n{script}\n')
            aside.chmod(0o755)
            aside.rename(folder / name)
        return folder

    commands(
        srun="exit 1",
        sbatch="echo Submitted batch job 4711",
        squeue='echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1',
        scancel="exit 0",
        sinfo="true",
    )
    return commands


@pytest.fixture
def echo_config(tmp_path: Path) -> Callable[..., MIIConfig]:
    """Make the configuration of a deployment named "chat" with an echo engine, on Slurm if not said otherwise."""

    def make(**fields: Any) -> MIIConfig:
        given: dict[str, Any] = {
            "inference_engine_config": {"engine": "echo"},
            "home": tmp_path / "home",
            "cluster": "slurm",
        }
        return resolve(**{**given, "deployment_name": "chat", **fields})

    return make


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--attention", default="auto", help="the engines' attention back end, where a test names none")
    parser.addoption("--families", action="store_true", help="all families of models, not a part")
    parser.addoption("--golden", action="store_true", help="write the golden files anew")
