"""The placement of ranks: pure arithmetic over ranks, nodes, replicas and roles."""

from __future__ import annotations

from dataclasses import dataclass

from mii_hpc.config import ModelConfig, SlurmConfig
from mii_hpc.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """The shape of a job.

    Ranks are dealt to nodes in order, `tasks_per_node` at a time; the last node may get fewer.
    """

    nodes: int
    tasks_per_node: int
    world_size: int


@dataclass(frozen=True)
class Role:
    """The replica that a rank belongs to, and its rank there. Rank 0 of a replica leads it."""

    rank: int
    replica: int
    replica_rank: int
    tensor_parallel: int

    @property
    def leads(self) -> bool:
        """Whether this rank answers for its replica."""
        return self.replica_rank == 0

    @property
    def replica_ranks(self) -> range:
        """The ranks of the world that form this replica, its leader first."""
        first = self.replica * self.tensor_parallel
        return range(first, first + self.tensor_parallel)


def role_of(rank: int, tensor_parallel: int) -> Role:
    """Return a rank's role: consecutive ranks form a replica."""
    return Role(rank, rank // tensor_parallel, rank % tensor_parallel, tensor_parallel)


def place(model: ModelConfig, slurm: SlurmConfig) -> Placement:
    """Choose nodes and tasks per node.

    A replica does not straddle nodes when one node can hold it; a larger one spans as few nodes as hold it
    evenly. Nodes get equally many replicas, as far as these divide. Where neither GPUs nor `tasks_per_node` are given,
    every replica gets a node of its own. Several ranks may be put on one GPU, but not those of one replica.
    Raises ConfigError when the nodes described cannot hold the shape.
    """
    tp, replicas = model.tensor_parallel, model.replica_num
    gpus = slurm.gpus or None
    if slurm.tasks_per_node is None:
        per_node = _tasks_per_node(tp, replicas, gpus)
    else:
        per_node = min(slurm.tasks_per_node, model.world_size)
        if gpus is not None and min(per_node, tp) > gpus:
            raise ConfigError(
                f"slurm.tasks_per_node={per_node}: the ranks of a replica take a GPU each, and with "
                f"tensor_parallel={tp} a node has {min(per_node, tp)} of them, but {gpus} GPU{'s' * (gpus > 1)}"
            )
        if per_node % tp and tp % per_node:
            raise ConfigError(
                f"slurm.tasks_per_node={per_node}: with tensor_parallel={tp} a replica would straddle nodes "
                f"unevenly; allowed are the multiples and the divisors of {tp}"
            )
    return Placement(nodes=-(-model.world_size // per_node), tasks_per_node=per_node, world_size=model.world_size)


def _tasks_per_node(tp: int, replicas: int, gpus: int | None) -> int:
    if gpus is None:
        return tp
    if gpus >= tp:
        nodes = -(-replicas // (gpus // tp))
        return -(-replicas // nodes) * tp
    # The largest share of a replica that a node can hold and that leaves no node with less than others.
    share = next(size for size in range(gpus, 0, -1) if tp % size == 0)
    if share == 1 < gpus:
        raise ConfigError(
            f"tensor_parallel={tp}: a replica spans nodes of {gpus} GPUs only in equal parts of more than one GPU; "
            f"allowed are up to {gpus}, and multiples of a number from 2 to {gpus}"
        )
    return share
