"""The balancer process: `python -m mii_hpc.job.balancer RUN_DIR HOST:PORT SPANS_HOSTS`, started by rank 0."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import sys
import time
from pathlib import Path

from mii_hpc import schedulers
from mii_hpc.deployments import credentials
from mii_hpc.deployments.registry import Registry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.job.balancer.balancer import Balancer
from mii_hpc.job.logs import log_to_stderr
from mii_hpc.job.process import end_with_rank

log = logging.getLogger(__name__)


async def serve(run: RunDir, address: str, spans_hosts: bool) -> int:
    """Run the balancer at "host:port" until the deployment has ended. Returns the process's exit status."""
    config = run.load_config()
    keys = credentials.load_server(run)
    balancer = Balancer(run, config, keys)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, balancer.ending.begin, "the balancer was told to end")
    host, port = address.rsplit(":", 1)
    # On several hosts, login nodes may come in by another interface than the ranks do.
    await balancer.listen(f"{'0.0.0.0' if spans_hosts else host}:{port}")
    log.info("listening on %s", address)
    job = schedulers.scheduler(config.cluster).own_job(run)
    ends = await asyncio.to_thread(job.ends)
    claimed = Registry(config.home).get(config.deployment_name)
    if claimed is None or claimed.run_dir != run.path:
        log.error("the name '%s' is not claimed for this run", config.deployment_name)
        return 1
    await balancer.serve(
        claimed.model_copy(
            update={
                "job_id": job.id,
                "job_host": job.host,
                "state": "loading",
                "host": socket.gethostname(),
                "address": address,
                "fingerprint": keys.as_client.fingerprint,
                "started": claimed.started or time.time(),
                "ends": ends,
            }
        )
    )
    return 0


def main(run_path: str, address: str, spans_hosts: str) -> None:
    """Run the balancer process."""
    end_with_rank()
    log_to_stderr()
    # So that idle connections without a token, each closed after a moment, keep no client from connecting.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.exit(asyncio.run(serve(RunDir(Path(run_path)), address, spans_hosts == "1")))


if __name__ == "__main__":
    main(*sys.argv[1:])
