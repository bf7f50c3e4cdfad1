"""Slurm: jobs are submitted through submitit; squeue and scancel do the rest.

squeue knows of a job at once and needs no accounting database, which submitit's own state comes from.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mii_hpc.config import MIIConfig
from mii_hpc.deployments.registry import Entry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.errors import ConfigError, SubmissionError
from mii_hpc.placement import Placement
from mii_hpc.schedulers.base import Job, JobState, Scheduler

COMMAND_SECONDS = 30.0
"""How long a Slurm command may take to answer."""
WALLTIME_WARNING_SECONDS = 60
"""How long before the walltime Slurm tells the ranks to end."""


class Slurm(Scheduler):
    """The Slurm cluster that this machine belongs to."""

    name: ClassVar[Literal["slurm"]] = "slurm"
    serves_other_hosts: ClassVar[bool] = True

    @staticmethod
    def is_here() -> bool:
        """Whether this machine can submit to Slurm."""
        return shutil.which("sbatch") is not None

    def check(self) -> None:
        """See Scheduler.check()."""
        if not self.is_here():
            raise SubmissionError("cluster='slurm': there is no sbatch on PATH; on a machine without Slurm use 'local'")

    def submit(self, run: RunDir, config: MIIConfig, placement: Placement) -> SlurmJob:
        """See Scheduler.submit()."""
        # Imported here, because only who submits a job needs it.
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = _executor(run, config, placement)
        try:
            with _outside_of_any_job():
                return SlurmJob(str(executor.submit(_run_rank, str(run.path)).job_id))
        except (FailedJobError, FailedSubmissionError) as error:
            raise SubmissionError(str(error).strip()) from error

    def script(self, run: RunDir, config: MIIConfig, placement: Placement) -> str:
        """See Scheduler.script()."""
        executor = _executor(run, config, placement)
        return str(executor._make_submission_file_text(executor._submitit_command_str, "RUN"))

    def job(self, entry: Entry) -> SlurmJob:
        """See Scheduler.job()."""
        return SlurmJob(entry.job_id)

    def own_job(self, run: RunDir) -> SlurmJob:
        """See Scheduler.own_job()."""
        return SlurmJob(os.environ["SLURM_JOB_ID"])


@dataclass(frozen=True)
class SlurmJob(Job):
    """A Slurm job."""

    id: str
    host: str = ""

    def state(self) -> JobState:
        """Ask squeue."""
        try:
            answer = _run("squeue", "--noheader", "--states=all", f"--jobs={self.id}", "--format=%T|%r")
        except (OSError, subprocess.TimeoutExpired) as error:
            return JobState("unknown", reason=str(error))
        if answer.returncode != 0:
            gone = "Invalid job id" in answer.stderr
            return JobState("gone" if gone else "unknown", reason=answer.stderr.strip())
        name, _, reason = answer.stdout.strip().partition("|")
        if name in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
            return JobState("pending", name, reason)
        if name in ("RUNNING", "CONFIGURING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "RESIZING", "STOPPED"):
            return JobState("running", name, reason)
        return JobState("gone", name, reason)

    def ends(self) -> float | None:
        """Ask squeue."""
        try:
            answer = _run("squeue", "--noheader", f"--jobs={self.id}", "--format=%e", SLURM_TIME_FORMAT="%s")
            return float(answer.stdout)
        except (OSError, subprocess.TimeoutExpired, ValueError):
            return None

    def cancel(self) -> None:
        """Run scancel."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            _run("scancel", self.id)


@dataclass(frozen=True)
class Allocation:
    """What a batch script has been given."""

    job_id: str
    tasks: int


def own_allocation() -> Allocation:
    """Return the allocation that this process, a batch script's, is in. Raises ConfigError outside of one."""
    try:
        return Allocation(os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_NTASKS"]))
    except KeyError as missing:
        raise ConfigError(
            f"{missing.args[0]} is not set: this is for batch scripts; elsewhere use mii_hpc.serve()"
        ) from None


def _executor(run: RunDir, config: MIIConfig, placement: Placement) -> Any:
    import submitit

    executor = submitit.SlurmExecutor(folder=run.submitit, python=config.slurm.python)
    executor.update_parameters(**executor_parameters(config, placement))
    return executor


def executor_parameters(config: MIIConfig, placement: Placement) -> dict[str, Any]:
    """Return what submitit's Slurm executor is told: a pure function of the configuration."""
    slurm = config.slurm
    srun_args = [
        f"--mpi={slurm.mpi}",
        # Ranks are dealt to nodes in order, so that the ranks of a replica stay together.
        f"--distribution=plane={placement.tasks_per_node}",
        # A rank or a node that dies takes its replica with it, and nothing else.
        "--kill-on-bad-exit=0",
        "--no-kill",
    ]
    if slurm.cpus_per_task is not None:
        srun_args.append(f"--cpus-per-task={slurm.cpus_per_task}")  # not inherited by srun from 22.05 until 23.11
    additional: dict[str, Any] = {"ntasks": placement.world_size, "no-kill": True}
    for name in ("time", "mem", "reservation"):
        if getattr(slurm, name) is not None:
            additional[name] = getattr(slurm, name)
    return {
        "job_name": f"mii-{config.deployment_name}",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": None,  # submitit's default is 5 minutes; the partition's own is better
        "nodes": placement.nodes,
        "ntasks_per_node": placement.tasks_per_node,
        "cpus_per_task": slurm.cpus_per_task,
        "gpus_per_node": slurm.gpus_per_node,
        "constraint": slurm.constraint,
        "nodelist": slurm.nodelist,
        "exclude": slurm.exclude,
        "exclusive": slurm.exclusive or None,
        "signal_delay_s": WALLTIME_WARNING_SECONDS,
        "wckey": None,
        "stderr_to_stdout": True,
        "setup": list(slurm.setup) or None,
        "srun_args": [*srun_args, *slurm.srun_args],
        "additional_parameters": {**additional, **slurm.extra},
    }


def _run_rank(run_path: str) -> None:
    """Run one rank: what submitit calls in each task. By name, because nobody imports it but the job itself."""
    importlib.import_module("mii_hpc.job.rank").main(run_path)


@contextlib.contextmanager
def _outside_of_any_job() -> Iterator[None]:
    """Hide the job around this process, if there is one: sbatch would hand its variables on to the new job."""
    from submitit.helpers import clean_env

    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    asked_for = {name: value for name, value in os.environ.items() if name.startswith(("SBATCH_", "SLURM_CONF"))}
    with clean_env():
        os.environ.update(asked_for)  # by the user, not by the job
        yield


def _run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
        env={**os.environ, **environment},
    )
