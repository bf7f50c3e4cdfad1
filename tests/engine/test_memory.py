from itertools import permutations

import pytest

pytest.importorskip("torch")

import torch

from mii_hpc.config import ModelConfig
from mii_hpc.engine.base import EngineSpec
from mii_hpc.engine.memory import share_of_device, threads

GPU, WEIGHTS, FRACTION = 80, 10, 0.8


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_that_share_a_gpu_plan_alike_whenever_they_measure_it(ranks):
    """A rank loads its weights, then measures and takes its cache; between the two, others may do either."""
    for order in set(permutations([*range(ranks)] * 2)):
        used, caches = 0, {}
        for rank in order:
            if rank not in caches:
                used, caches[rank] = used + WEIGHTS, None
            else:
                caches[rank] = share_of_device(GPU - used, GPU, WEIGHTS, ranks) * FRACTION - WEIGHTS
                used += caches[rank]
        assert len(set(caches.values())) == 1
        assert used == pytest.approx(FRACTION * GPU)


def test_what_strangers_have_of_a_gpu_is_not_planned_with():
    assert share_of_device(free=20, total=80, weights=10, sharing=1) == 30
    assert share_of_device(free=20, total=80, weights=10, sharing=2) == 30


@pytest.mark.parametrize(("device", "configured", "expected"), [("cpu", 3, 3), ("cuda", None, 1), ("cuda", 3, 3)])
def test_threads_that_meet_for_little_work_are_not_used(device, configured, expected):
    config = ModelConfig(model_name_or_path="m", inference_engine_config={"threads": configured})
    assert threads(EngineSpec.alone(config), torch.device(device)) == expected
