"""The next job of a deployment: it is submitted ahead, becomes ready, and takes the name before the walltime is over.

    before   job 1 has the name, and serves. Job 2 is in the queue, or loads; it keeps its entry in its run directory.
    then     job 2 is ready, and job 1 replaces its registry entry by that of job 2, in one write; nobody else writes
             there. Job 1 admits no request any more, and clients with one look the name up again. What it has in hand
             goes on, and what has not ended when the walltime is nearly over goes on at job 2.
    after    job 2 has the name, and submits job 3. Where job 1 is lost, job 2 takes the name itself.

The file `successor` in a run's directory names the run that may take its name. Where there is none, as when the
deployment was terminated, none may.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from mii_hpc import schedulers
from mii_hpc.config import MIIConfig, seconds_of
from mii_hpc.deployments import credentials
from mii_hpc.deployments.lookup import free_name, take_name
from mii_hpc.deployments.registry import SILENT_SECONDS, Entry, Registry, heartbeat_is_fresh
from mii_hpc.deployments.rundir import Chain, Failure, Progress, RunDir
from mii_hpc.deployments.state import DeploymentState
from mii_hpc.errors import DeploymentError, DeploymentExistsError, MIIError, SubmissionError
from mii_hpc.job.balancer.ending import Ending
from mii_hpc.placement import place
from mii_hpc.schedulers import Job, job_of
from mii_hpc.schedulers.base import SAFE_PATH

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often a job looks whether the next one is ready."""
SCHEDULER_SECONDS = 20.0
"""How often it asks the scheduler for its own end, and for the next job."""
AGAIN_SECONDS = 60.0
"""A job that could not be submitted, or has failed, is followed by another attempt after this long."""
SUBMIT_SECONDS = 120.0
"""How long submitting a job may take."""
LAST_SECONDS = 20.0
"""How long before the end of its walltime a job begins to end: the requests move, the ranks leave."""
STARTS = 2.0
"""The next job is given so many times as long to start as this one took."""
WALLTIME_SIGNAL_SECONDS = 120.0
"""A signal so shortly before the end of the walltime means that; one that comes earlier, that somebody ends the job."""


class Succession:
    """The place of one job among those that serve a name. Belongs to one event loop, but for what says otherwise.

    `on_name` is called, on another thread, while the job waits for its name, and once it has it.

    Attributes:
        until: when the deployment's uptime is over; None where it lasts as long as its job.
        next: the entry of the job that was submitted to take the name next.
        heir: that entry, once that job is ready.
        detail: what is wrong with it, in a few words.
    """

    def __init__(
        self, run: RunDir, config: MIIConfig, progress: Progress, job: Job | None, on_name: Callable[[], None]
    ) -> None:
        self._run, self._config, self._job, self._on_name = run, config, job, on_name
        self._registry = Registry(config.home)
        chain = run.read_chain()
        if chain is None and config.uptime is not None:
            chain = Chain(progress.started + seconds_of(config.uptime))
            run.write_chain(chain)
        self._chain = chain
        self._predecessor_job = chain.predecessor_job if chain else ""
        self._has_name = chain is None or chain.predecessor is None
        self.until = chain.until if chain else None
        self.next = self._submitted()
        self.heir: Entry | None = None
        self.detail = ""
        self._ends: float | None = None

    @property
    def is_quiet(self) -> bool:
        """Whether no other job is about to take the name, or to give it to this one."""
        return self._has_name and (self.next is None or self.next.state == DeploymentState.PENDING)

    @property
    def seconds_left(self) -> float:
        """How long requests may go on before the walltime is over."""
        return 0.0 if self._ends is None else self._ends - LAST_SECONDS - time.time()

    # ---- towards the name

    def has_name(self, entry: Entry) -> bool:
        """Whether this run has its name, after taking it where nobody has it any more. On any thread.

        Until then its entry is written to its own run directory. Raises DeploymentExistsError when it will not get the
        name.
        """
        if self._has_name:
            return True
        self._on_name()
        if self._takes_name(entry):
            self._on_name()
            self._has_name = True
            return True
        self._run.write_entry(entry)
        return False

    def _takes_name(self, entry: Entry) -> bool:
        assert self._chain is not None and self._chain.predecessor is not None
        holder = self._registry.get(entry.deployment_name)
        if holder is not None and holder.run_dir == self._run.path:
            return True
        predecessor = RunDir(self._chain.predecessor)
        if predecessor.read_successor() != self._run:
            raise DeploymentExistsError("the job before this one has ended for good, or has another successor")
        if holder is not None and holder.run_dir == predecessor.path:
            if holder.state == DeploymentState.PENDING and entry.state == DeploymentState.READY:
                self._registry.hand_over(predecessor.path, entry)  # that job waits in the queue, and writes nothing
                return True
            if heartbeat_is_fresh(holder, SILENT_SECONDS) or schedulers.is_live(holder):
                return False
        take_name(self._config, self._run, entry, schedulers.is_live)
        log.info("the job before this one is lost: this one has taken the name")
        return True

    # ---- away from it

    async def keep(self, ending: Ending, startup: Callable[[], float | None]) -> None:
        """See to the next job until the end has begun; begin it when the walltime or the uptime is over.

        `startup` gives the seconds that this job took to be ready; None before that.
        """
        if self.until is None or self._job is None:
            return
        asked = attempted = float("-inf")
        while not ending.has_begun:
            now = time.time()
            if now > asked + SCHEDULER_SECONDS:
                self._ends = await asyncio.to_thread(self._job.ends) or self._ends
                asked = now
                if self.next is not None:
                    await asyncio.to_thread(self._look_after)
            if now > self.until:
                ending.begin("its uptime is over")
            elif self._ends is None or self._ends >= self.until:
                pass
            elif now > self._ends - LAST_SECONDS and startup() is None:
                words = "it was not ready before its walltime was over; ask for a longer one (slurm.time)"
                ending.fail(Failure(-1, socket.gethostname(), words, ""))
            elif now > self._ends - LAST_SECONDS:
                ending.begin("its walltime is over", comes_back=self.next is not None)
            elif (took := startup()) is None:
                self._check(ending)
            elif self.next is not None:
                await asyncio.to_thread(self._look)
            elif now > attempted + AGAIN_SECONDS:
                attempted = now
                await asyncio.to_thread(self._submit, self._ends - self._config.handover - STARTS * took)
            await asyncio.sleep(LOOK_SECONDS)

    async def expects(self, is_requeued: Callable[[], bool]) -> bool:
        """Whether the name comes back after an end that a signal has begun: in this job, or the next."""
        if await asyncio.to_thread(is_requeued):
            return True
        if self.next is None or self._job is None:
            return False
        if self._ends is not None and time.time() > self._ends - WALLTIME_SIGNAL_SECONDS:
            return True
        return await asyncio.to_thread(self._job.is_preempted)

    def hand_over(self, heir: Entry) -> None:
        """Give the name to the next job. On any thread. Raises DeploymentError when it is this run's no longer."""
        credentials.hand_on(self._run, RunDir(heir.run_dir))
        self._registry.hand_over(self._run.path, heir)
        log.info("job %s has the name now", heir.job_id)

    def hasten(self) -> None:
        """Let the next job start now. On any thread."""
        if self.next is not None:
            job_of(self.next).hasten()

    def leave(self) -> None:
        """Give the name to the next job, which is to start now, though it is not ready. On any thread."""
        pass_on(self._run, self._config)

    def end(self) -> None:
        """End the job after this one, and the one before it, if this one has the name. On any thread."""
        self._run.successor.unlink(missing_ok=True)
        if self.next is not None:
            job_of(self.next).cancel()
            self.next = None
        if self._has_name and self._predecessor_job:
            job_of(Entry.of(self._config, self._run.path, "", self._predecessor_job)).cancel()
            self._predecessor_job = ""

    def _submitted(self) -> Entry | None:
        """Return the entry of the job that a balancer before this one has submitted."""
        successor = self._run.read_successor()
        return successor.read_entry() if successor else None

    def _check(self, ending: Ending) -> None:
        """Fail while serve() still waits where no job can be submitted."""
        try:
            schedulers.scheduler(self._config.cluster).check()
        except SubmissionError as error:
            host = socket.gethostname()
            message = f"uptime='{self._config.uptime}': the next job cannot be submitted from {host}: {error}"
            ending.fail(Failure(-1, host, message, ""))

    def _look(self) -> None:
        """See whether the next job is ready, and tell it of tokens that were rotated, which it reads before it is given
        the name.
        """
        successor = self._run.read_successor()
        entry = successor.read_entry() if successor else None
        if successor is None or entry is None or credentials.hand_on(self._run, successor):
            return
        self.next = entry
        is_ready = entry.state in (DeploymentState.READY, DeploymentState.DEGRADED)
        if is_ready and heartbeat_is_fresh(entry, SILENT_SECONDS):
            self.heir = entry

    def _look_after(self) -> None:
        """Forget the next job where it has ended, so that another is submitted."""
        assert self.next is not None
        if job_of(self.next).state().phase == "gone":
            failure = RunDir(self.next.run_dir).read_failure()
            self.detail = f"job {self.next.job_id}, which was to follow, has ended"
            self.detail += f": {failure.message}" if failure else ""
            log.warning("%s", self.detail)
            self.next = None

    def _submit(self, begin: float) -> None:
        """Submit the next job, not to start before a moment."""
        slurm = self._config.slurm
        extra = {name: value for name, value in slurm.extra.items() if name != "begin"}
        if begin > time.time():
            extra["begin"] = datetime.fromtimestamp(begin).isoformat(timespec="seconds")
        config = self._config.model_copy(update={"slurm": slurm.model_copy(update={"extra": extra})})
        assert self.until is not None and self._job is not None
        try:
            run = self._run.create_successor(config, Chain(self.until, self._run.path, self._job.id))
            entry = Entry.of(config, run.path, credentials.load_owner(run).fingerprint, submitted(run))
            run.write_entry(entry)
        except (OSError, MIIError, subprocess.TimeoutExpired) as error:
            self.detail = f"the next job could not be submitted: {error}"
            log.warning("%s", self.detail)
            return
        self.next, self.detail = entry, ""
        log.info("job %s is to follow, from %s on", entry.job_id, extra.get("begin", "now"))


def pass_on(run: RunDir, config: MIIConfig) -> bool:
    """Give the name of a run that cannot go on to the job that was submitted to follow, and let that start now.

    Returns False, with the name free, when there is none.
    """
    successor = run.read_successor()
    entry = successor.read_entry() if successor else None
    if entry is not None and job_of(entry).state().phase != "gone":
        try:
            Registry(config.home).hand_over(run.path, entry)
        except DeploymentError:
            return False
        job_of(entry).hasten()
        log.info("job %s has the name now; it is %s", entry.job_id, entry.state)
        return True
    free_name(config.home, Entry.of(config, run.path, ""))
    return False


def submitted(run: RunDir) -> str:
    """Submit a prepared run from inside of another job; return the new job's id.

    That takes an environment without that job's variables, and so a process of its own.
    """
    command = [sys.executable, *SAFE_PATH, "-m", __name__, str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SUBMIT_SECONDS, check=False)
    if done.returncode:
        raise SubmissionError(done.stderr.strip().rpartition("\n")[2] or f"status {done.returncode}")
    return done.stdout.strip()


def main(run_path: str) -> None:
    """Submit a run, and write the job's id to standard output."""
    run = RunDir(Path(run_path))
    config = run.load_config()
    job = schedulers.scheduler(config.cluster).submit(run, config, place(config.model_conf, config.slurm))
    sys.stdout.write(job.id)


if __name__ == "__main__":
    main(*sys.argv[1:])
