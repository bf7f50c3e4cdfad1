from typing import Any

import pytest

from tests.engine import collect


@pytest.fixture(autouse=True, scope="session")
def attention(request: pytest.FixtureRequest) -> None:
    collect.attention = request.config.getoption("--attention")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The steps that the engines of this process execute."""
    from mii_hpc.engine.runner import ModelRunner

    steps = []
    execute = ModelRunner.execute

    def note(self: ModelRunner, step: Any) -> Any:
        steps.append(step)
        return execute(self, step)

    monkeypatch.setattr(ModelRunner, "execute", note)
    return steps


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that the engines of this process load."""
    from mii_hpc.engine.model.loading import load_model

    models = []

    def note(*arguments: Any) -> Any:
        models.append(load_model(*arguments))
        return models[-1]

    monkeypatch.setattr("mii_hpc.engine.runner.load_model", note)
    return models
