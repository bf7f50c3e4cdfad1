"""One rank of a job that examines nodes: what `doctor` finds on its node, and whether the ranks meet over MPI."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from mii_hpc.deployments.rundir import Report, RunDir
from mii_hpc.errors import DeploymentFailedError
from mii_hpc.job import rendezvous
from mii_hpc.job.net import host_address
from mii_hpc.schedulers.base import SAFE_PATH

DOCTOR_SECONDS = 300.0
AROUND_US = ("SLURM_", "PMIX_", "PMI_", "OMPI_", "PRTE_")
"""Variables of the job step: what doctor starts is none of its ranks."""


def main(run_path: str) -> None:
    """Examine this node and write the report; then meet the other ranks, and write how that went."""
    for signum in (signal.SIGTERM, signal.SIGCONT):  # submitit ignores them
        signal.signal(signum, signal.SIG_DFL)
    run = RunDir(Path(run_path))
    config = run.load_config()
    report = Report(os.environ.get("SLURMD_NODENAME") or socket.gethostname(), host_address(), _findings(config.home))
    run.write_report(report)
    try:
        rendezvous.meet(
            config.model_conf.world_size, 1, lambda rank: rendezvous.Member(rank, report.host, report.address)
        )
        met = "yes"
    except DeploymentFailedError as error:
        met = str(error)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is what is to be reported)
        met = f"{type(error).__name__}: {error}"
    run.write_report(replace(report, met=met))


def _findings(home: Path) -> str:
    command = [sys.executable, *SAFE_PATH, "-m", "mii_hpc", "doctor", "--json", "--home", str(home)]
    ours = {n: value for n, value in os.environ.items() if n == "SLURM_CONF" or not n.startswith(AROUND_US)}
    return subprocess.run(
        command, env=ours, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DOCTOR_SECONDS, check=False
    ).stdout
