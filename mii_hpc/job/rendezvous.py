"""The rendezvous of a job's ranks: once, over MPI, which is finalised before any work begins.

While MPI is live, one rank that dies takes the whole job step with it; afterwards it does not. So MPI is only
for meeting, and this is the only module that imports mpi4py.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from mii_hpc.errors import DeploymentFailedError
from mii_hpc.placement import Role, role_of

log = logging.getLogger(__name__)

DEADLINE_SECONDS = 300.0
"""All ranks must have met within this time of the first one's start."""

SETTLE_SECONDS = 1.0
"""How long a rank waits between MPI_Init and its first message. With Open MPI 5, one that gets a message while it is
still inside MPI_Init crashes, and others may leave that earlier (github.com/open-mpi/ompi/issues/12495)."""


@dataclass(frozen=True)
class Member:
    """One rank, as the others know it after the rendezvous.

    Attributes:
        host: its node's name.
        address: the node's IP address, as other nodes reach it.
        balancer_port: rank 0 only: the port it keeps for the balancer; 0 on the others.
    """

    rank: int
    host: str
    address: str
    balancer_port: int = 0


@dataclass(frozen=True)
class World:
    """All ranks, after they have met, from the point of view of one of them."""

    role: Role
    members: tuple[Member, ...]

    @property
    def me(self) -> Member:
        """The rank whose view it is."""
        return self.members[self.role.rank]

    @property
    def on_this_host(self) -> list[int]:
        """The ranks on this rank's host, in order."""
        return [member.rank for member in self.members if member.host == self.me.host]

    @property
    def replica_on_this_host(self) -> list[int]:
        """The ranks of this rank's replica on its host, in order."""
        return [rank for rank in self.role.replica_ranks if self.members[rank].host == self.me.host]

    @property
    def replica_spans_hosts(self) -> bool:
        """Whether this rank's replica has ranks on more than one host."""
        return len(self.replica_on_this_host) < self.role.tensor_parallel

    @property
    def spans_hosts(self) -> bool:
        """Whether the job has ranks on more than one host."""
        return len(self.on_this_host) < len(self.members)


def meet(world_size: int, tensor_parallel: int, introduce: Callable[[int], Member]) -> World:
    """Meet the other ranks and return the world; MPI is finalised on return.

    `introduce` returns what the others need to know of this process, given its rank.
    Raises DeploymentFailedError when MPI gives a world of another size than was promised. Ends the process
    with a traceback when the others do not come within `DEADLINE_SECONDS`.
    """
    # MPI blocks in C, where no Python handler runs; faulthandler's watchdog thread still can end the process.
    faulthandler.dump_traceback_later(DEADLINE_SECONDS, exit=True)
    # Ranks may share cores, and a rank that spins while it waits keeps the others from their rendezvous.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI

        MPI.Init()
        world = MPI.COMM_WORLD
        if world.size != world_size:
            raise DeploymentFailedError(_mismatch(world.size, world_size, MPI.Get_library_version()))
        if world_size > 1 and MPI.Get_library_version().startswith("Open MPI v5"):
            time.sleep(SETTLE_SECONDS)
        role = role_of(world.rank, tensor_parallel)
        members: tuple[Member, ...] = tuple(world.allgather(introduce(world.rank)))
        replica = world.Split(color=role.replica, key=role.replica_rank)
        if replica.rank != role.replica_rank or replica.size != tensor_parallel:
            raise DeploymentFailedError(
                f"rank {world.rank} is {replica.rank} of {replica.size} in its replica communicator instead of "
                f"{role.replica_rank} of {tensor_parallel}"
            )
        replica.Barrier()
        replica.Free()
        MPI.Finalize()
    finally:
        faulthandler.cancel_dump_traceback_later()
    world_seen = World(role, members)
    log.info(
        "rank %d of %d on %s is rank %d of replica %d",
        role.rank,
        world_size,
        world_seen.me.host,
        role.replica_rank,
        role.replica,
    )
    return world_seen


def _mismatch(size: int, promised: int, library: str) -> str:
    if size == 1:
        name = library.splitlines()[0].partition(",")[0].strip()
        return (
            f"MPI sees a world of 1 rank where {promised} were started: the plugin of srun (`slurm.mpi`) does not "
            f"match the MPI library ({name}). Try one that `srun --mpi=list` names, such "
            "as mpi='pmix' for Open MPI or mpi='pmi2' for MPICH, or load the cluster's own MPI with slurm.setup"
        )
    return f"MPI sees a world of {size} ranks where tensor_parallel x replica_num = {promised} were promised"
