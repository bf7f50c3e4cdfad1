import pytest

from mii_hpc.engine.memory import ranks_per_device


@pytest.mark.parametrize(
    ("ranks", "visible", "allocated", "sharing"),
    [
        (4, 4, None, 1),  # all ranks see all devices
        (8, 4, "4", 2),
        (2, 1, None, 2),  # two replicas on the one device of this machine
        (4, 1, "4", 1),  # --gpus-per-task: each sees its own
        (4, 1, "2", 2),
        (4, 1, "", 4),
        (1, 8, "1", 1),
    ],
)
def test_ranks_that_share_a_device_are_counted(ranks, visible, allocated, sharing):
    environment = {} if allocated is None else {"SLURM_GPUS_ON_NODE": allocated}
    assert ranks_per_device(ranks, visible, environment) == sharing
