"""Schedulers: a module per back end, behind one interface. No code outside this package asks which one it is."""

from __future__ import annotations

from mii_hpc.deployments.registry import SILENT_SECONDS, Entry, heartbeat_is_fresh
from mii_hpc.deployments.state import DeploymentState
from mii_hpc.schedulers.base import Job, JobState, Scheduler
from mii_hpc.schedulers.local import Local
from mii_hpc.schedulers.slurm import Slurm

__all__ = ["Job", "JobState", "Scheduler", "choose", "is_live", "job_of", "scheduler", "state_of"]


def choose(cluster: str) -> Scheduler:
    """Return the scheduler to submit to: the one of that name; for "auto", Slurm where it is, else this machine.

    Raises SubmissionError when nothing can be submitted to it from here.
    """
    if cluster == "auto":
        return Slurm() if Slurm.is_here() else Local()
    chosen = scheduler(cluster)
    chosen.check()
    return chosen


def scheduler(name: str) -> Scheduler:
    """Return the scheduler of that name, whether or not it can be reached from here."""
    return {Slurm.name: Slurm, Local.name: Local}[name]()


def job_of(entry: Entry) -> Job:
    """Return the job behind a registry entry."""
    return scheduler(entry.cluster).job(entry)


def is_live(entry: Entry, is_own: bool = True) -> bool:
    """Whether the deployment of an entry still exists, by its job's state and its heartbeat.

    Of one that is not one's own the heartbeat alone tells: a cluster may hide the jobs of other users.
    """
    if not is_own or not entry.job_id:  # or claimed, and about to be submitted
        return heartbeat_is_fresh(entry)
    state = job_of(entry).state()
    match state.phase:
        case "gone":  # a job that is requeued completes before it is pending again
            return state.name == "COMPLETING" and entry.state == DeploymentState.PENDING
        case "pending":  # in the queue, perhaps again
            return True
        case _:  # a scheduler may take long to see that a job's processes are gone; the heartbeat tells
            return entry.state == DeploymentState.PENDING or heartbeat_is_fresh(entry)


def state_of(entry: Entry, is_own: bool = True) -> DeploymentState:
    """Return the state of an entry's deployment as it is now, also where nobody is left to write it."""
    if not is_live(entry, is_own):
        return DeploymentState.ENDED
    is_down = entry.address and not heartbeat_is_fresh(entry, SILENT_SECONDS)
    return DeploymentState.UNRESPONSIVE if is_down else entry.state
