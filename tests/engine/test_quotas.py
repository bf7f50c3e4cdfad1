import pytest

from mii_hpc.config import GenerateParamsConfig, LimitsConfig, ModelConfig
from mii_hpc.engine.base import EngineSpec
from mii_hpc.engine.quotas import Quotas
from mii_hpc.errors import QueueFullError
from mii_hpc.generation import GUEST, OWNER, GenerationRequest


def spec(queue_bound=4, **limits):
    engine = {"engine": "echo", "queue_bound": queue_bound, "echo_delay": 0.001}
    return EngineSpec(ModelConfig(inference_engine_config=engine), 0, 1, 0, 1, 1, "", "", limits=LimitsConfig(**limits))


def request(role, prompt="a", admitted=False):
    return GenerationRequest("", prompt, GenerateParamsConfig(), admitted=admitted, caller=(role, "ipv4:192.0.2.1:5"))


@pytest.mark.parametrize(
    ("role", "limits", "name", "most"),
    [
        (OWNER, {}, "queue_bound", 5),
        (GUEST, {}, "limits.guest_waiting", 3),
        (OWNER, {"owner_waiting": 2}, "limits.owner_waiting", 2),
        (GUEST, {"guest_waiting": 4}, "limits.guest_waiting", 4),
    ],
)
def test_as_many_requests_of_a_role_wait_as_its_limit_says(role, limits, name, most):
    quotas = Quotas(spec(queue_bound=5, **limits))
    for _ in range(most):
        quotas.enter(request(role))
    with pytest.raises(QueueFullError) as refused:
        quotas.enter(request(role))
    assert str(refused.value) == f"{most} requests are waiting, and {name}={most} are allowed; try again later"
    other = GUEST if role == OWNER else OWNER
    quotas.enter(request(other))
    quotas.enter(request(role, admitted=True))
    assert quotas.waiting == most + 2
    for _ in range(2):
        quotas.leave(request(role))
    quotas.enter(request(role))


@pytest.mark.parametrize("role", [OWNER, GUEST])
def test_as_many_bytes_of_a_role_wait_as_its_limit_says(role):
    name = f"{role}_waiting_bytes"
    quotas = Quotas(spec(**{name: 100}))
    quotas.enter(request(role, "x" * 101))  # alone in any case
    with pytest.raises(QueueFullError) as refused:
        quotas.enter(request(role, (1, 2)))
    assert str(refused.value) == (
        f"101 bytes of requests are waiting, 16 are to come, and limits.{name}=100 are allowed; try again later"
    )
    quotas.leave(request(role, "x" * 101))
    quotas.enter(request(role, "x" * 50))
    quotas.enter(request(role, "x" * 50))
