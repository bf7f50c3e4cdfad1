import itertools
from collections import Counter

import pytest

from mii_hpc.config import ModelConfig, SlurmConfig
from mii_hpc.errors import ConfigError
from mii_hpc.placement import Placement, place, role_of


def placed(tp, replicas, gpus=None, tasks=None):
    return place(
        ModelConfig(tensor_parallel=tp, replica_num=replicas), SlurmConfig(gpus_per_node=gpus, tasks_per_node=tasks)
    )


@pytest.mark.parametrize(
    ("shape", "nodes", "tasks_per_node"),
    [
        # (tp, replicas, gpus_per_node, tasks_per_node)
        ((1, 1, None, None), 1, 1),
        ((2, 2, None, None), 2, 2),
        ((2, 2, 4, None), 1, 4),
        ((2, 3, 4, None), 2, 4),
        ((2, 2, 8, None), 1, 4),
        ((3, 4, 8, None), 2, 6),
        ((4, 1, 2, None), 2, 2),
        ((8, 2, 4, None), 4, 4),
        ((6, 1, 4, None), 2, 3),
        ((2, 4, 0, None), 4, 2),
        ((2, 2, None, 1), 4, 1),
        ((2, 2, None, 4), 1, 4),
        ((2, 2, None, 100), 1, 4),
        ((4, 2, 8, 2), 4, 2),
        ((2, 5, 8, 4), 3, 4),
        ((2, 5, 8, None), 2, 6),
        ((2, 2, 1, None), 4, 1),
        ((1, 4, 1, 4), 1, 4),
        ((2, 2, 2, 4), 1, 4),
    ],
)
def test_shapes(shape, nodes, tasks_per_node):
    assert placed(*shape) == Placement(nodes, tasks_per_node, shape[0] * shape[1])


def test_no_replica_straddles_nodes_when_one_can_hold_it():
    accepted = 0
    for tp, replicas, gpus, tasks in itertools.product(
        range(1, 9), range(1, 6), (None, 0, *range(1, 9)), (None, *range(1, 9))
    ):
        try:
            placement = placed(tp, replicas, gpus, tasks)
        except ConfigError:
            continue
        accepted += 1
        node_of = [rank // placement.tasks_per_node for rank in range(tp * replicas)]
        assert placement.world_size == tp * replicas
        assert set(node_of) == set(range(placement.nodes)), "no node is idle, and none is missing"
        if gpus and tasks is None:
            assert max(Counter(node_of).values()) <= gpus
        for replica in range(replicas):
            parts = Counter(node_of[rank] for rank in role_of(replica * tp, tp).replica_ranks)
            assert max(parts.values()) <= (gpus or tp), "no two ranks of a replica share a GPU"
            assert len(parts) == 1 or (placement.tasks_per_node < tp and len(set(parts.values())) == 1)
            if tasks is None:
                assert len(parts) == 1 or gpus < tp
    assert accepted > 1000


def test_roles_make_every_replica_complete():
    for tp, replicas in itertools.product(range(1, 5), range(1, 5)):
        roles = [role_of(rank, tp) for rank in range(tp * replicas)]
        for replica in range(replicas):
            members = [role for role in roles if role.replica == replica]
            assert [role.replica_rank for role in members] == list(range(tp))
            assert [role.leads for role in members] == [True] + [False] * (tp - 1)
            assert all(list(role.replica_ranks) == [m.rank for m in members] for role in members)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((7, 1, 4, None), r"^tensor_parallel=7: .*nodes of 4 GPUs.*allowed are up to 4, and multiples of a .* 2 to 4$"),
        ((4, 2, 2, 4), r"^slurm\.tasks_per_node=4: .*with tensor_parallel=4 a node has 4 of them, but 2 GPUs$"),
        ((4, 2, None, 3), r"^slurm\.tasks_per_node=3: .*allowed are the multiples and the divisors of 4$"),
        ((4, 2, None, 6), r"^slurm\.tasks_per_node=6: "),
    ],
)
def test_refusals(shape, sentence):
    with pytest.raises(ConfigError, match=sentence):
        placed(*shape)
