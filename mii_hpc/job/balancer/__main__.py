"""The balancer process: `python -m mii_hpc.job.balancer RUN_DIR HOST:PORT SPANS_HOSTS`, started by rank 0."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from pathlib import Path

from mii_hpc import schedulers
from mii_hpc.config import MIIConfig
from mii_hpc.deployments import credentials
from mii_hpc.deployments.lookup import take_name
from mii_hpc.deployments.registry import Entry, Registry
from mii_hpc.deployments.rundir import Failure, RunDir
from mii_hpc.deployments.state import DeploymentState
from mii_hpc.errors import DeploymentExistsError
from mii_hpc.job.balancer.balancer import Balancer
from mii_hpc.job.balancer.ending import Ending
from mii_hpc.job.logs import log_to_stderr
from mii_hpc.job.process import collect_garbage, end_with_rank, raise_file_limit, tell
from mii_hpc.job.signals import END_CHILD
from mii_hpc.rpc import liveness

log = logging.getLogger(__name__)


async def serve(run: RunDir, address: str, spans_hosts: bool) -> int:
    """Run the balancer at "host:port" until the deployment has ended. Returns the process's exit status."""
    config = run.load_config()
    keys = credentials.load_server(run)
    job = schedulers.scheduler(config.cluster).own_job(run)
    progress = run.begin(job.incarnation)
    balancer = Balancer(run, config, keys, progress, job)
    balancer.tasks.start(_live())
    balancer.tasks.start(collect_garbage())
    # Of a deployment that was ready, whoever has not joined in a moment was lost while there was no balancer.
    for member in run.read_members() if progress.ready else ():
        balancer.replacements.lose(member["rank"], member["host"])
    asyncio.get_running_loop().add_signal_handler(END_CHILD, balancer.ending.on_signal, "the balancer was told to end")
    host, port = address.rsplit(":", 1)
    # On several hosts, login nodes may come in by another interface than the ranks do.
    await balancer.listen(f"{'0.0.0.0' if spans_hosts else host}:{port}")
    log.info("listening on %s", address)
    claimed = await asyncio.to_thread(_claimed, config, run, keys.as_client.fingerprint, balancer.ending)
    update = {
        "job_id": job.id,
        "job_host": job.host,
        "incarnation": job.incarnation,
        "state": DeploymentState.LOADING,
        "host": socket.gethostname(),
        "address": address,
        "started": progress.started,
        "ends": await asyncio.to_thread(job.ends),
    }
    await balancer.serve(claimed.model_copy(update=update), job.is_requeued)
    return 0


async def _live() -> None:
    while True:
        tell(alive="")
        await asyncio.sleep(liveness.BEAT_SECONDS)


def _claimed(config: MIIConfig, run: RunDir, fingerprint: str, ending: Ending) -> Entry:
    """Return the run's entry; a run that has none takes its name again, or fails, or waits until it is given one."""
    claimed = Registry(config.home).get(config.deployment_name)
    chain, successor = run.read_chain(), run.read_successor()
    if claimed is not None and claimed.run_dir == run.path:
        return claimed
    own = Entry.of(config, run.path, fingerprint)
    if claimed is not None and successor is not None and claimed.run_dir == successor.path:
        ending.begin(f"job {claimed.job_id} has taken over", comes_back=True)
    elif chain is None or chain.predecessor is None:
        try:
            take_name(config, run, own, schedulers.is_live)
        except DeploymentExistsError as error:
            ending.fail(Failure(-1, socket.gethostname(), str(error), ""))
    return own


def main(run_path: str, address: str, spans_hosts: str) -> None:
    """Run the balancer process."""
    end_with_rank()
    log_to_stderr()
    raise_file_limit()
    sys.exit(asyncio.run(serve(RunDir(Path(run_path)), address, spans_hosts == "1")))


if __name__ == "__main__":
    main(*sys.argv[1:])
