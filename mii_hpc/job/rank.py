"""One rank: the rendezvous with the others over MPI, then supervision until the deployment ends.

`python -m mii_hpc.job.rank RUN_DIR` is what every rank of every deployment runs, under srun or mpiexec.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import traceback
from pathlib import Path

from mii_hpc.config import MIIConfig
from mii_hpc.deployments.lookup import free_name
from mii_hpc.deployments.registry import Registry
from mii_hpc.deployments.rundir import Failure, RunDir
from mii_hpc.job import rendezvous
from mii_hpc.job.logs import log_to_file, log_to_stderr
from mii_hpc.job.net import LOOPBACK, host_address, reserve_port
from mii_hpc.job.supervisor import supervise
from mii_hpc.schedulers import scheduler

log = logging.getLogger(__name__)


def live(run: RunDir) -> None:
    """Run this rank; return when the deployment has ended well.

    Raises DeploymentFailedError when it failed. On rank 0, the registry has no entry of this run afterwards.
    """
    config = run.load_config()
    with contextlib.ExitStack() as held:
        world = rendezvous.meet(
            config.model_conf.world_size,
            config.model_conf.tensor_parallel,
            introduce=lambda rank: _introduce(rank, config, held),
        )
        log_to_file(run.rank_log(world.role.rank))
        first = world.members[0]
        reached_from_elsewhere = world.spans_hosts or scheduler(config.cluster).serves_other_hosts
        address = f"{first.address if reached_from_elsewhere else LOOPBACK}:{first.balancer_port}"
        try:
            asyncio.run(supervise(run, world, address))
        finally:
            if world.role.rank == 0:
                _withdraw(run, config)


def _introduce(rank: int, config: MIIConfig, held: contextlib.ExitStack) -> rendezvous.Member:
    port = 0
    if rank == 0:
        port = held.enter_context(reserve_port("0.0.0.0", config.port_number)).getsockname()[1]
    return rendezvous.Member(rank, socket.gethostname(), host_address(), port)


def _withdraw(run: RunDir, config: MIIConfig) -> None:
    entry = Registry(config.home).get(config.deployment_name)
    if entry is not None and entry.run_dir == run.path:
        free_name(config.home, entry)


def main(run_path: str) -> None:
    """Run one rank. Exits with status 0 when the deployment ended well, else 1 with the reason in the run directory."""
    os.umask(0o077)
    # A core dump would hold the deployment's secrets.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Inherited dispositions do not count: submitit ignores SIGTERM and SIGCONT, and a shell has background processes
    # ignore SIGINT. Until the supervisor handles them, a signal simply ends the rank.
    inherited = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGCONT, signal.SIGHUP, signal.SIGCHLD}
    for signum in inherited:
        signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, inherited)
    log_to_stderr()
    run = RunDir(Path(run_path))
    try:
        live(run)
    except Exception as error:
        log.exception("the rank has failed")
        rank = int(os.environ.get("SLURM_PROCID") or os.environ.get("OMPI_COMM_WORLD_RANK") or -1)
        with contextlib.suppress(OSError):
            if run.read_failure() is None:  # else this is only its echo
                run.write_failure(
                    Failure(
                        rank,
                        socket.gethostname(),
                        f"rank {rank}: {type(error).__name__}: {error}",
                        traceback.format_exc(),
                    )
                )
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
