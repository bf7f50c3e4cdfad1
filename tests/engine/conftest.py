import pytest

from tests.engine import collect

try:
    from mii_hpc.engine import runner
except ImportError:  # without torch, only the echo engine is tested
    runner = None


@pytest.fixture(autouse=True, scope="session")
def attention(request):
    collect.attention = request.config.getoption("--attention")


@pytest.fixture
def steps(monkeypatch):
    """The steps that the engines of this process execute."""
    steps = []
    execute = runner.ModelRunner.execute

    def note(self, step):
        steps.append(step)
        return execute(self, step)

    monkeypatch.setattr(runner.ModelRunner, "execute", note)
    return steps


@pytest.fixture
def models(monkeypatch):
    """The models that the engines of this process load."""
    models = []
    load = runner.load_model

    def note(*arguments):
        models.append(load(*arguments))
        return models[-1]

    monkeypatch.setattr(runner, "load_model", note)
    return models
