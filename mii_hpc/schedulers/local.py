"""The local machine, without a scheduler: a job is a process that runs the ranks under mpiexec; its id is the job's."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mii_hpc.config import MIIConfig
from mii_hpc.deployments.registry import Entry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.errors import SubmissionError
from mii_hpc.placement import Placement
from mii_hpc.schedulers.base import SAFE_PATH, Job, JobState, Scheduler, setup_script

JOB_ID = "MII_HPC_JOB_ID"
"""The environment variable with the job's id, in the job's processes."""
STARTING_SECONDS = 2.0
"""A process that has no command line for so long is no program that is being started."""
_AROUND_US = ("SLURM_", "PMIX_", "PMI_", "OMPI_", "PRTE_")
"""Variables of a job that this process may be in; mpiexec would take our ranks for that job's."""


class Local(Scheduler):
    """The machine that we are on."""

    name: ClassVar[Literal["local"]] = "local"
    serves_other_hosts: ClassVar[bool] = False
    has_walltime: ClassVar[bool] = False

    def check(self) -> None:
        """Do nothing: a process can be started anywhere."""

    def fit(self, config: MIIConfig) -> MIIConfig:
        """Return it as it is: the ranks share this machine's GPUs."""
        return config

    def submit(self, run: RunDir, config: MIIConfig, placement: Placement) -> LocalJob:
        """See Scheduler.submit()."""
        command = _command(run, config)
        run.job_log.touch(0o600)
        try:
            with run.job_log.open("ab") as log:
                process = subprocess.Popen(
                    command,
                    env={name: value for name, value in os.environ.items() if not name.startswith(_AROUND_US)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C and a closed terminal are meant for this process, not for the job
                )
        except OSError as error:
            raise SubmissionError(f"{command[0]}: cannot be started: {error.strerror}") from error
        # If this process is still there when the job ends, it reads its exit status, so that the job is no zombie.
        threading.Thread(target=process.wait, name="mii-local-job", daemon=True).start()
        return LocalJob(str(process.pid), socket.gethostname(), run.path)

    def script(self, run: RunDir, config: MIIConfig, placement: Placement) -> str:
        """See Scheduler.script()."""
        return shlex.join(_command(run, config))

    def job(self, entry: Entry) -> LocalJob:
        """See Scheduler.job()."""
        return LocalJob(entry.job_id, entry.job_host, entry.run_dir)

    def own_job(self, run: RunDir) -> LocalJob:
        """See Scheduler.own_job()."""
        return LocalJob(os.environ[JOB_ID], socket.gethostname(), run.path)


def _command(run: RunDir, config: MIIConfig) -> list[str]:
    python = shlex.split(config.slurm.python) if config.slurm.python else [sys.executable]
    command = [*python, *SAFE_PATH, "-m", "mii_hpc.job.launch", str(run.path)]
    if config.slurm.setup:
        command = ["bash", "-c", "\n".join([*setup_script(config.slurm.setup), 'exec "$@"']), "setup", *command]
    return command


@dataclass(frozen=True)
class LocalJob(Job):
    """A job on one machine."""

    id: str
    host: str
    run_dir: Path

    def state(self) -> JobState:
        """Look the process up. From another machine its state is unknown."""
        if self.host != socket.gethostname():
            return JobState("unknown", reason=f"it runs on {self.host}")
        process = Path("/proc") / self.id
        deadline = time.monotonic() + STARTING_SECONDS
        while True:
            try:
                command = (process / "cmdline").read_bytes()
                zombie = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                return JobState("gone")
            if command or zombie:
                ours = str(self.run_dir).encode() in command
                return JobState("running") if ours and not zombie else JobState("gone")
            if time.monotonic() > deadline:
                return JobState("unknown", reason=f"process {self.id} does not tell what it runs")
            time.sleep(0.005)  # a program is being started, ours or another

    def ends(self) -> None:
        """Return None: there is no walltime."""

    def start_rank(self, run: RunDir, config: MIIConfig, rank: int, node: str) -> bool:
        """Do nothing: mpiexec ends all ranks when one dies.

        Told to spare them (Open MPI's --enable-recovery), it would also leave those that wait for ever to meet one
        that has died before.
        """
        return True

    def hasten(self) -> None:
        """Do nothing: it has started."""

    def cancel(self) -> None:
        """Send SIGTERM to the process, which tells the ranks."""
        if self.state().phase == "running":
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self.id), signal.SIGTERM)
