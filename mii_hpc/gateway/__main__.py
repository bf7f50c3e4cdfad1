"""The gateway in the job: `python -m mii_hpc.gateway RUN_DIR HOST`, started by rank 0."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from pathlib import Path

from mii_hpc.deployments import credentials
from mii_hpc.deployments.files import write_atomically
from mii_hpc.deployments.lookup import OwnHome
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.gateway.server import Keys, Listening, serve
from mii_hpc.job.logs import log_to_stderr
from mii_hpc.job.net import LOOPBACK
from mii_hpc.job.process import end_with_rank

log = logging.getLogger(__name__)


def main(run_path: str, host: str) -> None:
    """Answer at a host's address until SIGINT; where others reach it, on all interfaces."""
    end_with_rank()
    log_to_stderr()
    run = RunDir(Path(run_path))
    config = run.load_config()
    credentials.create_for_gateway(run, {host, LOOPBACK, "localhost", socket.gethostname(), socket.getfqdn()})
    listening = Listening(
        host=host if host == LOOPBACK else "0.0.0.0",
        port=config.gateway_port,
        key=run.gateway_key,
        certificate=run.gateway_certificate,
    )
    tokens = [run.owner_token, *([run.guest_token] if config.share else [])]
    keys = Keys(lambda: [credentials.read_token(token) for token in tokens])

    def on_start(url: str) -> None:
        write_atomically(run.gateway_url, f"https://{host}:{url.rpartition(':')[2]}")
        log.info("answering at %s", run.read_gateway_url())

    with contextlib.suppress(KeyboardInterrupt):
        serve(config.deployment_name, OwnHome(config.home), listening, on_start, keys)


if __name__ == "__main__":
    main(*sys.argv[1:])
