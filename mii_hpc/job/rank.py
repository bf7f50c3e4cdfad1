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
from dataclasses import asdict
from pathlib import Path

from mii_hpc.config import MIIConfig
from mii_hpc.deployments.files import write_atomically
from mii_hpc.deployments.lookup import free_name
from mii_hpc.deployments.registry import SILENT_SECONDS, Registry, heartbeat_is_fresh
from mii_hpc.deployments.rundir import Failure, RunDir
from mii_hpc.deployments.state import DeploymentState
from mii_hpc.errors import RegistryError
from mii_hpc.job import rendezvous
from mii_hpc.job.balancer.succession import pass_on
from mii_hpc.job.logs import log_to_file, log_to_stderr
from mii_hpc.job.net import LOOPBACK, host_address, reserve_port
from mii_hpc.job.prepared_engine import PreparedEngine
from mii_hpc.job.process import raise_file_limit
from mii_hpc.job.signals import DRAIN
from mii_hpc.job.supervisor import AbandonedError, supervise
from mii_hpc.placement import role_of
from mii_hpc.schedulers import scheduler

log = logging.getLogger(__name__)

REVIVE_AGAIN_SECONDS = 15.0
"""How often the others try to start rank 0 again."""


async def live(run: RunDir, lost: int | None = None) -> None:
    """Run this rank; return when the deployment has ended well.

    `lost` is the number of the rank when it is started again in place of one that was lost; the others go on, and
    nobody meets. Raises DeploymentFailedError when the deployment failed.
    """
    config = run.load_config()
    job = scheduler(config.cluster).own_job(run)
    number = _launched_as() if lost is None else lost
    async with contextlib.AsyncExitStack() as held:
        prepared = None
        if number is not None:
            prepared = await PreparedEngine.start(run, number)
            held.push_async_callback(prepared.end)
        if lost is None:
            world = rendezvous.meet(  # blocks: nothing else runs on this loop yet
                config.model_conf.world_size,
                config.model_conf.tensor_parallel,
                introduce=lambda rank: _introduce(rank, config, held),
            )
            log_to_file(run.rank_log(world.role.rank))
            if world.role.rank == 0:
                run.write_members([asdict(member) for member in world.members])
        else:
            members = tuple(rendezvous.Member(**member) for member in run.read_members())
            world = rendezvous.World(role_of(lost, config.model_conf.tensor_parallel), members)
            if _lives(run.rank_process(lost), run):
                log.warning("rank %d is not lost: its process lives", lost)
                return
            if lost == 0:
                held.enter_context(reserve_port("0.0.0.0", members[0].balancer_port))
        if prepared is not None and prepared.rank != world.role.rank:  # its log is another's
            await prepared.end()
            prepared = None
        write_atomically(run.rank_process(world.role.rank), f"{os.getpid()}")
        first = world.members[0]
        reached_from_elsewhere = world.spans_hosts or scheduler(config.cluster).serves_other_hosts
        address = f"{first.address if reached_from_elsewhere else LOOPBACK}:{first.balancer_port}"

        def revive() -> None:
            if world.role.rank != 0 and run.may_revive(REVIVE_AGAIN_SECONDS):
                log.warning("rank 0 is lost: starting it again on %s", first.host)
                job.start_rank(run, config, 0, first.host)

        def serves_others() -> bool:
            return world.role.rank != 0 and is_served(run, config)

        try:
            await supervise(run, world, address, revive, serves_others, prepared)
        except AbandonedError:
            pass_on(run, config)
            job.cancel()  # also where no batch script is left to end it
            raise
        finally:
            if world.role.rank == 0:
                _withdraw(run, config)


def _launched_as() -> int | None:
    """Return this rank's number as its launcher says it, before the ranks have met; None where it does not."""
    # mpiexec's variables first: within a job of Slurm it may leave those of its own daemons.
    for names in (("OMPI_COMM_WORLD_RANK",), ("PMIX_RANK", "PMI_RANK"), ("SLURM_PROCID",)):
        numbers = {number for name in names if (number := os.environ.get(name, "")).isdecimal()}
        if numbers:
            # Where two launchers differ, one has started the shell of the other.
            return int(numbers.pop()) if len(numbers) == 1 else None
    return None


def _lives(process: Path, run: RunDir) -> bool:
    """Whether a rank's process, on this host, is still there."""
    try:
        proc = Path("/proc") / process.read_text()
        is_ours = str(run.path).encode() in (proc / "cmdline").read_bytes()
        return is_ours and (proc / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_served(run: RunDir, config: MIIConfig) -> bool:
    """Whether the run's balancer, which this rank does not reach, gives its signs of life in the registry."""
    try:
        entry = Registry(config.home).get(config.deployment_name)
    except (OSError, RegistryError):
        return False
    return (
        entry is not None
        and entry.run_dir == run.path
        and entry.address != ""
        and heartbeat_is_fresh(entry, SILENT_SECONDS)
    )


def _introduce(rank: int, config: MIIConfig, held: contextlib.AsyncExitStack) -> rendezvous.Member:
    port = 0
    if rank == 0:
        port = held.enter_context(reserve_port("0.0.0.0", config.port_number)).getsockname()[1]
    return rendezvous.Member(rank, os.environ.get("SLURMD_NODENAME") or socket.gethostname(), host_address(), port)


def _withdraw(run: RunDir, config: MIIConfig) -> None:
    entry = Registry(config.home).get(config.deployment_name)
    # A balancer that ended in order has withdrawn it, or left it as that of a job that is pending again.
    if entry is not None and entry.run_dir == run.path and entry.state != DeploymentState.PENDING:
        pass_on(run, config)


def main(run_path: str, lost: str = "") -> None:
    """Run one rank. Exits with status 0 when the deployment ended well, else 1 with the reason in the run directory."""
    os.umask(0o077)
    # A core dump would hold the deployment's secrets.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    raise_file_limit()
    # Inherited dispositions do not count: submitit ignores SIGTERM and SIGCONT, and a shell has background processes
    # ignore SIGINT. Until the supervisor handles them, a signal simply ends the rank.
    inherited = {*DRAIN, signal.SIGCONT, signal.SIGCHLD}
    for signum in inherited:
        signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, inherited)
    os.environ.setdefault("HOME", str(Path("~").expanduser()))  # MPI libraries complain without
    log_to_stderr()
    run = RunDir(Path(run_path))
    try:
        asyncio.run(live(run, int(lost) if lost else None))
    except Exception as error:
        log.exception("the rank has failed")
        number = int(lost) if lost else _launched_as()
        rank = -1 if number is None else number
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
            # Where it failed before there was a balancer, whose entry it is then.
            entry = Registry(run.load_config().home).get(run.load_config().deployment_name)
            if entry is not None and entry.run_dir == run.path and not entry.address:
                free_name(run.load_config().home, entry)
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
