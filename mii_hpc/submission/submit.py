"""From a configuration to a job: prepare its run directory, submit it, ask for its state, cancel it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from mii_hpc.config import MIIConfig
from mii_hpc.deployments import credentials
from mii_hpc.deployments.registry import Entry, Registry, heartbeat_is_fresh
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.deployments.sharing import Share
from mii_hpc.errors import DeploymentError, SubmissionError
from mii_hpc.placement import Placement, place
from mii_hpc.signals import signals_blocked
from mii_hpc.submission.checkpoint import check_model

log = logging.getLogger(__name__)

COMMAND_SECONDS = 30.0
"""How long a Slurm command may take to answer."""
WALLTIME_WARNING_SECONDS = 60
"""How long before the walltime Slurm tells the ranks to end."""
FOREVER_MINUTES = 10 * 365 * 24 * 60


@dataclass(frozen=True)
class JobState:
    """What the scheduler says of a job.

    phase: "pending" in the queue; "running"; "gone" when it has ended or was never there; "unknown" when the
    scheduler did not answer. name and reason are the scheduler's own words.
    """

    phase: Literal["pending", "running", "gone", "unknown"]
    name: str = ""
    reason: str = ""


class Job(Protocol):
    """A job of either kind of cluster."""

    @property
    def id(self) -> str:
        """What the scheduler calls it."""

    def state(self) -> JobState:
        """Ask the scheduler. Never raises."""

    def cancel(self) -> None:
        """Ask for the job's end; harmless when it has ended already."""


@dataclass(frozen=True)
class SlurmJob:
    """A Slurm job. Its state comes from squeue, which knows of it at once and needs no accounting database."""

    id: str

    def state(self) -> JobState:
        """Ask squeue."""
        try:
            answer = subprocess.run(
                ["squeue", "--noheader", "--states=all", f"--jobs={self.id}", "--format=%T|%r"],
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
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
        """Return when the walltime is over, in seconds since the epoch; None when squeue does not know."""
        try:
            answer = subprocess.run(
                ["squeue", "--noheader", f"--jobs={self.id}", "--format=%e"],
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                check=True,
                env={**os.environ, "SLURM_TIME_FORMAT": "%s"},
            )
            return float(answer.stdout)
        except (OSError, subprocess.SubprocessError, ValueError):
            return None

    def cancel(self) -> None:
        """Run scancel."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["scancel", self.id], capture_output=True, timeout=COMMAND_SECONDS, check=False)


@dataclass(frozen=True)
class LocalJob:
    """A job on one machine: submitit's controller process, which goes by its process id."""

    id: str
    host: str
    run_dir: Path

    def state(self) -> JobState:
        """Look the process up. From another machine its state is unknown."""
        if self.host != socket.gethostname():
            return JobState("unknown", reason=f"it runs on {self.host}")
        process = Path("/proc") / self.id
        try:
            command = (process / "cmdline").read_bytes()
            ours = str(self.run_dir).encode() in command or not command  # empty while the program is being started
            zombie = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return JobState("gone")
        return JobState("running") if ours and not zombie else JobState("gone")

    def cancel(self) -> None:
        """Send SIGTERM to the controller, which passes it on to the ranks."""
        if self.state().phase == "running":
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self.id), signal.SIGTERM)


def job_of(entry: Entry) -> Job:
    """Return the job behind a registry entry."""
    if entry.cluster == "slurm":
        return SlurmJob(entry.job_id)
    return LocalJob(entry.job_id, entry.job_host, entry.run_dir)


def is_live(entry: Entry) -> bool:
    """Whether the deployment of an entry still exists, by its job's state and its heartbeat."""
    if not entry.job_id:  # claimed, and about to be submitted
        return heartbeat_is_fresh(entry)
    match job_of(entry).state().phase:
        case "gone":
            return False
        case "pending":  # in the queue, perhaps again
            return True
        case _:  # a scheduler may take long to see that a job's processes are gone; the heartbeat tells
            return entry.state == "pending" or heartbeat_is_fresh(entry)


def check(config: MIIConfig) -> tuple[MIIConfig, Placement]:
    """Check on the login node all that can be known before the queue, and return the resolved configuration.

    Raises ConfigError, or RegistryError when the home directory cannot be used.
    """
    cluster = config.cluster
    if cluster == "auto":
        cluster = "slurm" if shutil.which("sbatch") else "local"
    elif cluster == "slurm" and shutil.which("sbatch") is None:
        raise SubmissionError("cluster='slurm': there is no sbatch on PATH; on a machine without Slurm use 'local'")
    if config.shared_group is not None:
        Share(config.home, config.deployment_name, config.shared_group).check()
    config = config.model_copy(update={"cluster": cluster, "model_conf": check_model(config.model_conf)})
    return config, place(config.model_conf, config.slurm)


def prepare(config: MIIConfig) -> tuple[RunDir, Entry]:
    """Take the deployment's name and make the run directory with everything that the job needs.

    `config` is a checked one. Raises DeploymentExistsError when the name is taken, RegistryError when the home
    directory cannot be used.
    """
    run = RunDir.create(config)
    try:
        keys = credentials.create(run)
        now = time.time()
        entry = Entry(
            deployment_name=config.deployment_name,
            model=config.model_conf.model_name_or_path or config.model_conf.inference_engine_config.engine,
            tensor_parallel=config.model_conf.tensor_parallel,
            replica_num=config.model_conf.replica_num,
            cluster="slurm" if config.cluster == "slurm" else "local",
            job_id=os.environ.get("SLURM_JOB_ID", "") if _inside_job_of(config) else "",
            job_host="" if config.cluster == "slurm" else socket.gethostname(),
            fingerprint=keys.fingerprint,
            run_dir=run.path,
            submitted=now,
            heartbeat=now,
        )
        Registry(config.home).claim(entry, is_live)
        if config.shared_group is not None:
            try:
                Share(config.home, config.deployment_name, config.shared_group).create(run)
            except BaseException:
                free_name(entry, config)
                raise
    except BaseException:
        shutil.rmtree(run.path)
        raise
    return run, entry


def submit(run: RunDir, entry: Entry, config: MIIConfig, placement: Placement) -> Entry:
    """Submit a prepared run and return its entry, now with the job's id.

    Raises SubmissionError with the scheduler's own words; the name is free again then.
    """
    registry = Registry(config.home)
    try:
        job_id = _submit_to_slurm(run, config, placement) if entry.cluster == "slurm" else _submit_locally(run, config)
    except BaseException:
        free_name(entry, config)
        shutil.rmtree(run.path)
        raise
    entry = entry.model_copy(update={"job_id": job_id})
    published = registry.get(config.deployment_name)
    if published is not None and published.state == "pending":  # else the job has begun to write it itself
        with contextlib.suppress(DeploymentError):
            registry.publish(entry)
    log.info("deployment '%s' submitted as job %s; its files are in %s", entry.deployment_name, job_id, run.path)
    return entry


def free_name(entry: Entry, config: MIIConfig) -> None:
    """Withdraw what a run shared, and its entry; nothing happens when the name is another run's by now."""
    registry = Registry(config.home)
    holder = registry.get(config.deployment_name)
    if holder is not None and holder.run_dir != entry.run_dir:
        return
    if config.shared_group is not None:  # first, while nobody else can take the name and share it anew
        Share(config.home, config.deployment_name, config.shared_group).withdraw()
    registry.withdraw(entry)


def slurm_parameters(config: MIIConfig, placement: Placement) -> dict[str, Any]:
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


def _submit_to_slurm(run: RunDir, config: MIIConfig, placement: Placement) -> str:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from mii_hpc.job import rank

    executor = submitit.SlurmExecutor(folder=run.submitit, python=config.slurm.python)
    executor.update_parameters(**slurm_parameters(config, placement))
    try:
        return str(executor.submit(rank.main, str(run.path)).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        raise SubmissionError(str(error).strip()) from error


def _submit_locally(run: RunDir, config: MIIConfig) -> str:
    import submitit

    from mii_hpc.job import launch

    executor = submitit.LocalExecutor(folder=run.submitit, python=config.slurm.python)
    # Not with submitit's `setup`: the job would be a shell that does not pass on signals.
    executor.update_parameters(timeout_min=FOREVER_MINUTES, stderr_to_stdout=True)
    # Ctrl-C or a closed terminal is meant for this process, not for the deployment.
    with signals_blocked(signal.SIGINT, signal.SIGHUP), _streams_in(run.controller_log):
        job = executor.submit(launch.main, str(run.path), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return str(job.job_id)


@contextlib.contextmanager
def _streams_in(log_file: Path) -> Iterator[None]:
    """Send what processes started meanwhile write to a file, so that nobody who reads this one waits for their end."""
    kept = {descriptor: os.dup(descriptor) for descriptor in (0, 1, 2)}
    output = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    try:
        for descriptor, instead in ((0, nothing), (1, output), (2, output)):
            os.dup2(instead, descriptor)
        yield
    finally:
        for descriptor, before in kept.items():
            os.dup2(before, descriptor)
        for descriptor in (output, nothing, *kept.values()):
            os.close(descriptor)


def _inside_job_of(config: MIIConfig) -> bool:
    return config.cluster == "slurm" and "SLURM_JOB_ID" in os.environ
