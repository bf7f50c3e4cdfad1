"""Slurm: jobs are submitted through submitit; squeue and scancel do the rest.

squeue knows of a job at once and needs no accounting database, which submitit's own state comes from.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mii_hpc import gres
from mii_hpc.config import MIIConfig, SlurmConfig
from mii_hpc.deployments.registry import Entry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.errors import ConfigError, SubmissionError
from mii_hpc.placement import Placement, place
from mii_hpc.schedulers.base import SAFE_PATH, Job, JobState, Scheduler, setup_script

log = logging.getLogger(__name__)

COMMAND_SECONDS = 30.0
"""How long a Slurm command may take to answer."""
WALLTIME_WARNING_SECONDS = 60
"""How long before the walltime Slurm tells the ranks to end."""
UPTIME_SIGNAL = "CONT@1"
"""What it tells them instead where another job follows: nothing. Slurm's warning may come a minute too early, and the
balancer knows the time."""


_TOO_MUCH = "the job asks for more than the partition allows or has, and does not start as it is"
_LIMIT = "the job is above a limit of its account or QOS, and does not start as it is"
MEANINGS = {
    "PartitionConfig": _TOO_MUCH,
    "PartitionNodeLimit": _TOO_MUCH,
    "PartitionTimeLimit": "the job asks for more time than the partition allows, and does not start as it is",
    "BadConstraints": "no node is what the job asks for; it does not start as it is",
    "ReqNodeNotAvail": "nodes that the job needs are down, drained or reserved",
    "PartitionDown": "the partition takes no jobs at the moment",
    "PartitionInactive": "the partition starts no jobs at the moment",
    "AccountNotAllowed": "the account may not use the partition",
    "InvalidAccount": "Slurm does not know the account",
    "InvalidQOS": "Slurm does not know the QOS",
    "QOSNotAllowed": "the QOS may not be used here",
    "AssocMaxNodePerJobLimit": _LIMIT,
    "AssocMaxCpuPerJobLimit": _LIMIT,
    "QOSMaxNodePerJobLimit": _LIMIT,
    "QOSMaxCpuPerJobLimit": _LIMIT,
    "QOSMaxGRESPerJob": _LIMIT,
    "JobHeldUser": "the job is held; release it with scontrol release",
    "JobHeldAdmin": "the cluster's administrators hold the job",
    "DependencyNeverSatisfied": "what the job depends on has failed; it never starts",
}
"""What Slurm's reasons mean that are not only a matter of waiting."""


class Slurm(Scheduler):
    """The Slurm cluster that this machine belongs to."""

    name: ClassVar[Literal["slurm"]] = "slurm"
    serves_other_hosts: ClassVar[bool] = True
    has_walltime: ClassVar[bool] = True

    @staticmethod
    def is_here() -> bool:
        """Whether this machine can submit to Slurm."""
        return shutil.which("sbatch") is not None

    def check(self) -> None:
        """See Scheduler.check()."""
        if not self.is_here():
            raise SubmissionError("cluster='slurm': there is no sbatch on PATH; on a machine without Slurm use 'local'")

    def fit(self, config: MIIConfig) -> MIIConfig:
        """Ask for one GPU per rank where the partition has GPUs, and nobody has said what else to ask for.

        Where the job gets GPUs, device "auto" is CUDA: a rank that finds none there is a mistake to be told of. Raises
        ConfigError when device is "cuda", and only other partitions have GPUs.
        """
        model = config.model_conf
        if model.inference_engine_config.engine == "echo" or model.device == "cpu" or _asks_for_gpus(config.slurm):
            return _with_device(config, "cpu") if config.slurm.gpus == 0 else config
        try:
            answer = _run("sinfo", "--all", "--noheader", f"--format={gres.SINFO_FORMAT}", *_nodes_named(config.slurm))
            problem = answer.stderr.strip() if answer.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        if problem:
            log.warning("no GPU is asked for, since sinfo does not say whether there are any: %s", problem)
            return config
        return with_gpus(config, gres.read_nodes(answer.stdout), os.environ)

    def submit(self, run: RunDir, config: MIIConfig, placement: Placement) -> SlurmJob:
        """See Scheduler.submit()."""
        return _submitted(run, config, placement, "mii_hpc.job.rank")

    def examine(self, run: RunDir, config: MIIConfig, placement: Placement) -> SlurmJob:
        """Submit the same job, whose ranks examine their nodes and end. Raises SubmissionError like submit()."""
        return _submitted(run, config, placement, "mii_hpc.job.examination")

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
        if reason in MEANINGS:
            reason = f"{reason}: {MEANINGS[reason]}"
        # A suspended job gives no sign of life, and is none the worse for it.
        if name in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "STOPPED"):
            return JobState("pending", name, reason)
        if name in ("RUNNING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "RESIZING"):
            return JobState("running", name, reason)
        return JobState("gone", name, reason)

    @property
    def incarnation(self) -> int:
        """See Job."""
        return int(os.environ.get("SLURM_RESTART_COUNT", 0))

    def is_requeued(self) -> bool:
        """See Job: squeue counts the next start already."""
        try:
            answer = _run("squeue", "--noheader", "--states=all", f"--jobs={self.id}", "--Format=RestartCnt")
            return int(answer.stdout) > self.incarnation
        except (OSError, subprocess.TimeoutExpired, ValueError):
            return False

    def is_preempted(self) -> bool:
        """See Job: squeue tells of a job that has a grace time."""
        try:
            answer = _run("squeue", "--noheader", f"--jobs={self.id}", "--Format=PreemptTime")
            return answer.returncode == 0 and answer.stdout.strip() not in ("", "N/A")
        except (OSError, subprocess.TimeoutExpired):
            return False

    def hasten(self) -> None:
        """See Job."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            _run("scontrol", "update", f"JobId={self.id}", "StartTime=now")

    def ends(self) -> float | None:
        """Ask squeue."""
        try:
            answer = _run("squeue", "--noheader", f"--jobs={self.id}", "--format=%e", SLURM_TIME_FORMAT="%s")
            return float(answer.stdout)
        except (OSError, subprocess.TimeoutExpired, ValueError):
            return None

    def start_rank(self, run: RunDir, config: MIIConfig, rank: int, node: str) -> bool:
        """See Job.start_rank(): a job step that shares what the first one has.

        The batch script, and with it the job, lasts as long as one of the ranks that it has started itself.
        """
        if not self._has(node):
            return False
        slurm = config.slurm
        gpus = [f"--gres={slurm.gres}"] if slurm.gres else []
        gpus += [f"--gpus-per-node={slurm.gpus_per_node}"] if slurm.gpus_per_node else []
        command = [
            *("srun", f"--jobid={self.id}", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}"),
            *("--mpi=none", "--cpu-bind=none", "--kill-on-bad-exit=0", *gpus),
            *(sys.executable, *SAFE_PATH, "-m", "mii_hpc.job.rank", str(run.path), str(rank)),
        ]
        kept = ("SLURM_CONF", "SLURM_JOB_ID")
        around_us = ("SLURM_", "PMIX_", "PMI_", "OMPI_", "PRTE_")
        environment = {
            name: value for name, value in os.environ.items() if name in kept or not name.startswith(around_us)
        }
        with run.rank_log(rank).open("ab") as log_file:
            step = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
            )
        threading.Thread(target=step.wait, name="mii-step", daemon=True).start()  # so that it is no zombie
        return True

    def _has(self, node: str) -> bool:
        """Whether the job still has a node: Slurm takes one that is down away from a job that goes on without it."""
        try:
            answer = _run("squeue", "--noheader", f"--jobs={self.id}", f"--nodelist={node}", "--format=%i")
            return answer.returncode != 0 or bool(answer.stdout.strip())
        except (OSError, subprocess.TimeoutExpired):
            return True

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


def with_gpus(config: MIIConfig, nodes: list[gres.Nodes], environment: Mapping[str, str]) -> MIIConfig:
    """Return a configuration that asks for one GPU per rank, if the partition has any. A pure function, but for a log.

    `nodes` are those of the whole cluster. sbatch puts what the environment says before the configuration. Raises
    ConfigError when device is "cuda", and only other partitions have GPUs.
    """
    model, slurm = config.model_conf, config.slurm
    partition = environment.get("SBATCH_PARTITION") or slurm.partition
    constraint = environment.get("SBATCH_CONSTRAINT") or slurm.constraint
    own = gres.of_partitions(nodes, partition, constraint)
    if not own:
        return config  # sbatch says what is wrong with that
    named = f"partition '{partition}'" if partition else "the default partition"
    named += f" with constraint '{constraint}'" if constraint else ""
    if (chosen := gres.choose(own, model.tensor_parallel, model.replica_num)) is None:
        if others := sorted({each.partition for each in nodes if each.gpus}):
            there = f"{named} has no GPUs; partitions that have some: {', '.join(map(repr, others))}"
            if model.device == "cuda":
                raise ConfigError(f"device='cuda': {there} (slurm.partition)")
            log.warning("%s (slurm.partition); here the model is served on CPUs", there)
        return config
    placement = place(model, slurm.model_copy(update={"gpus_per_node": chosen.per_node}))
    per_node = min(placement.tasks_per_node, chosen.per_node)
    request = chosen.request(per_node)
    log.info("%s has nodes with GPUs: asking for --gres=%s on each of %d", named, request, placement.nodes)
    if (idle := per_node * placement.nodes - placement.world_size) > 0:
        log.warning(
            "%d of the job's %d GPUs will be idle: every node gets %d, and %d replicas do not divide over %d nodes",
            idle,
            per_node * placement.nodes,
            per_node,
            model.replica_num,
            placement.nodes,
        )
    requests = ",".join(filter(None, (slurm.gres, request)))
    return _with_device(config.model_copy(update={"slurm": slurm.model_copy(update={"gres": requests})}), "cuda")


def _asks_for_gpus(slurm: SlurmConfig) -> bool:
    """Whether the user has said what GPUs to ask for, in whatever way sbatch reads."""
    elsewhere = {name.removeprefix("SBATCH_").lower() for name in os.environ if name.startswith("SBATCH_")}
    directives = {name.replace("-", "_") for name in slurm.extra} | elsewhere
    asked = "gres" in directives or any(name.startswith(("gpus", "tres_per")) for name in directives)
    return asked or slurm.gpus is not None


def _nodes_named(slurm: SlurmConfig) -> list[str]:
    """Return what restricts sinfo to the nodes that the job is for."""
    return [f"--nodes={slurm.nodelist}"] if slurm.nodelist and "/" not in slurm.nodelist else []


def _with_device(config: MIIConfig, device: Literal["cuda", "cpu"]) -> MIIConfig:
    """Return the configuration with this device where it says "auto"."""
    if config.model_conf.device != "auto":
        return config
    return config.model_copy(update={"model_conf": config.model_conf.model_copy(update={"device": device})})


def _executor(run: RunDir, config: MIIConfig, placement: Placement) -> Any:
    import submitit

    python = config.slurm.python or shlex.quote(sys.executable)
    executor = submitit.SlurmExecutor(folder=run.submitit, python=" ".join((python, *SAFE_PATH)))
    executor.update_parameters(**executor_parameters(config, placement))
    return executor


def executor_parameters(config: MIIConfig, placement: Placement) -> dict[str, Any]:
    """Return the parameters of submitit's Slurm executor: a pure function of the configuration."""
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
    for name in ("time", "mem", "reservation", "gres"):
        if getattr(slurm, name) is not None:
            additional[name] = getattr(slurm, name)
    if config.uptime is not None:
        additional["signal"] = UPTIME_SIGNAL
    return {
        "job_name": f"mii-{config.deployment_name}",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": None,  # submitit's default is 5 minutes; the partition's own is better
        "nodes": placement.nodes,
        "ntasks_per_node": placement.tasks_per_node,
        "cpus_per_task": slurm.cpus_per_task,
        "gpus_per_node": slurm.gpus_per_node or None,
        "constraint": slurm.constraint,
        "nodelist": slurm.nodelist,
        "exclude": slurm.exclude,
        "exclusive": slurm.exclusive or None,
        "signal_delay_s": WALLTIME_WARNING_SECONDS,
        "wckey": None,
        "stderr_to_stdout": True,
        # srun takes the batch script's place, and passes on what is sent to that alone (scancel --batch).
        "setup": [*setup_script(slurm.setup), 'srun() { exec "$(type -P srun)" "$@"; }'],
        "srun_args": [*srun_args, *slurm.srun_args],
        "additional_parameters": {**additional, **slurm.extra},
    }


def _submitted(run: RunDir, config: MIIConfig, placement: Placement, module: str) -> SlurmJob:
    # Imported here, because only who submits a job needs it.
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = _executor(run, config, placement)
    try:
        with _outside_of_any_job():
            return SlurmJob(str(executor.submit(_run_rank, module, str(run.path)).job_id))
    except (FailedJobError, FailedSubmissionError) as error:
        raise SubmissionError(str(error).strip()) from error


def _run_rank(module: str, run_path: str) -> None:
    """Run one rank: submitit calls this in each task. It imports the module by name, because only the job needs it."""
    importlib.import_module(module).main(run_path)


@contextlib.contextmanager
def _outside_of_any_job() -> Iterator[None]:
    """Hide the job around this process, if there is one: sbatch would hand its variables on to the new job."""
    from submitit.helpers import clean_env

    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    asked_for = {name: value for name, value in os.environ.items() if name.startswith(("SBATCH_", "SLURM_CONF"))}
    of_mpi = [name for name in os.environ if name.startswith(("PMIX_", "PMI_", "OMPI_", "PRTE_"))]
    with clean_env(of_mpi):
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
