"""The interface of a scheduler: it submits a deployment's job and knows its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from mii_hpc.config import MIIConfig
from mii_hpc.deployments.registry import Entry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.placement import Placement

SAFE_PATH = ("-P",)
"""Python's option that keeps the working directory out of the import path: others may be able to write there."""


@dataclass(frozen=True)
class JobState:
    """What the scheduler says of a job.

    phase: "pending" in the queue; "running"; "gone" when it has ended or was never there; "unknown" when the
    scheduler did not answer. name and reason are the scheduler's.
    """

    phase: Literal["pending", "running", "gone", "unknown"]
    name: str = ""
    reason: str = ""


def setup_script(lines: Sequence[str]) -> list[str]:
    """Return `slurm.setup` as lines of bash that end the job with a sentence where one of them fails or exits."""
    if not lines:
        return []
    told = r"""echo "mii_hpc: slurm.setup: '\''$BASH_COMMAND'\'' ended with status $mii_status" """.strip()
    return [
        f"trap 'mii_status=$?; trap - EXIT; {told}; exit $mii_status' ERR",
        f"trap 'mii_status=$?; {told}' EXIT",
        *lines,
        "trap - ERR EXIT",
    ]


class Job(ABC):
    """A job that was submitted.

    Attributes:
        id: what the scheduler calls it.
        host: the only machine that knows its state; "" when every machine of the cluster does.
    """

    id: str
    host: str

    @abstractmethod
    def state(self) -> JobState:
        """Ask the scheduler. Never raises."""

    @property
    def incarnation(self) -> int:
        """How often this job, in which this process runs, was started before."""
        return 0

    def is_requeued(self) -> bool:
        """Whether this job, in which this process runs, is to be started again when it has ended. Never raises."""
        return False

    def is_preempted(self) -> bool:
        """Whether the scheduler is about to end this job for the sake of another. Never raises."""
        return False

    @abstractmethod
    def hasten(self) -> None:
        """Let a job start now that waits for a later moment; harmless otherwise."""

    @abstractmethod
    def ends(self) -> float | None:
        """Return when the walltime is over, in seconds since the epoch; None without one, or when it is not known."""

    @abstractmethod
    def start_rank(self, run: RunDir, config: MIIConfig, rank: int, node: str) -> bool:
        """Start a rank of this job again on a node of it, without waiting.

        Returns False when the job has lost the node, and it cannot be done ever again. Only for processes of the job.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Ask for the job's end; harmless when it has ended already."""


class Scheduler(ABC):
    """One back end.

    Attributes:
        name: what `cluster` calls it.
        serves_other_hosts: whether clients come from other hosts than those of the job.
        has_walltime: whether it ends jobs after a while.
    """

    name: ClassVar[Literal["slurm", "local"]]
    serves_other_hosts: ClassVar[bool]
    has_walltime: ClassVar[bool]

    @abstractmethod
    def check(self) -> None:
        """Raise SubmissionError, with what to do, when nothing can be submitted from this machine."""

    @abstractmethod
    def fit(self, config: MIIConfig) -> MIIConfig:
        """Return the configuration with what it leaves to the cluster filled in: GPUs, and so the device.

        Raises ConfigError for what the cluster does not have.
        """

    @abstractmethod
    def submit(self, run: RunDir, config: MIIConfig, placement: Placement) -> Job:
        """Submit the ranks of a prepared run as one job. Raises SubmissionError with the scheduler's message."""

    @abstractmethod
    def script(self, run: RunDir, config: MIIConfig, placement: Placement) -> str:
        """Return what submit() would have executed, as text. The run need not exist."""

    @abstractmethod
    def job(self, entry: Entry) -> Job:
        """Return the job behind a registry entry."""

    @abstractmethod
    def own_job(self, run: RunDir) -> Job:
        """Return the job that this process is a part of. Only for processes of a deployment's job."""
