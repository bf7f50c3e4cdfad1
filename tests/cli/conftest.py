import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mii_hpc.cli.main import app
from tests.live import InThread


class Ran:
    """A command that has ended."""

    def __init__(self, result: Result) -> None:
        self.status, self.output, self.errors = result.exit_code, result.stdout, result.stderr
        self.exception = result.exception

    @property
    def data(self) -> Any:
        return json.loads(self.output)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run a command of mii-hpc in this process, as where nobody has said how wide or coloured a terminal is."""
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def invoke(*arguments: str | Path, input: str | None = None) -> Ran:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result)

    return invoke


@pytest.fixture
def chat(deploy_in_thread: Callable[..., InThread], monkeypatch: pytest.MonkeyPatch) -> InThread:
    """A running deployment named "chat" with two echo engines, in the default home."""
    deployment = deploy_in_thread()
    monkeypatch.setenv("MII_HPC_HOME", str(deployment.config.home))
    return deployment
