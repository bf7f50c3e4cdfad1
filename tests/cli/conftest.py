import json

import pytest
from typer.testing import CliRunner

from mii_hpc.cli.main import app


class Ran:
    """A command that has ended."""

    def __init__(self, result):
        self.status, self.output, self.errors = result.exit_code, result.stdout, result.stderr
        self.exception = result.exception

    @property
    def data(self):
        return json.loads(self.output)


@pytest.fixture
def run():
    """Run a command of mii-hpc in this process."""

    def invoke(*arguments, input=None):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result)

    return invoke


@pytest.fixture
def chat(deploy_in_thread, monkeypatch):
    """A running deployment named "chat" with two echo engines, in the default home."""
    deployment = deploy_in_thread()
    monkeypatch.setenv("MII_HPC_HOME", str(deployment.config.home))
    return deployment
