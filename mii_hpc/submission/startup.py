"""Waiting until a submitted deployment is ready, with its progress shown: pending, starting, loading."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console

from mii_hpc.config import MIIConfig
from mii_hpc.deployments.files import tail
from mii_hpc.deployments.lookup import free_name
from mii_hpc.deployments.registry import Entry, Registry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.deployments.state import DeploymentState
from mii_hpc.errors import DeploymentFailedError, DeploymentTimeoutError
from mii_hpc.schedulers import Job, JobState, job_of

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
PENDING_POLL_SECONDS = 1.0
"""A job may be in the queue for hours."""
"""How often the registry and the run directory are read."""
SCHEDULER_SECONDS = (2.0, 15.0)
"""How often the scheduler is asked: at first, and after some minutes; many users share it."""


def wait_until_ready(run: RunDir, entry: Entry, config: MIIConfig) -> None:
    """Return when every replica of the deployment has generated something.

    Cancels the job in all other cases: raises DeploymentFailedError as soon as a rank or the job dies, with the end
    of its log, and DeploymentTimeoutError when `queue_timeout` or `startup_timeout` has passed. Ctrl-C cancels it too.
    """
    job = job_of(entry)
    try:
        with _shown(entry) as show:
            _wait(run, entry, config, job, show)
    except BaseException:
        job.cancel()
        if job.state().phase != "running":  # a running job withdraws its entry itself
            free_name(config.home, entry)
        raise


def _wait(run: RunDir, entry: Entry, config: MIIConfig, job: Job, show: Callable[[str], None]) -> None:
    registry = Registry(config.home)
    submitted, started, asked = time.monotonic(), None, float("-inf")
    state = JobState("pending")
    while True:
        failure = run.read_failure()
        if failure is not None:
            raise DeploymentFailedError(
                f"job {job.id} of deployment '{entry.deployment_name}' failed while starting: {failure.message}",
                deployment_name=entry.deployment_name,
                job_id=job.id,
                state="FAILED",
                log=failure.log,
            )
        now = time.monotonic()
        if now >= asked + SCHEDULER_SECONDS[now > submitted + 300]:
            state, asked = job.state(), now
        if state.phase == "gone":
            raise _died(run, entry, job, state)
        published = registry.get(entry.deployment_name)
        if published is not None and published.run_dir == entry.run_dir:
            if published.state in (DeploymentState.READY, DeploymentState.DEGRADED):
                return
            if published.state == DeploymentState.LOADING:
                started = started or now
                show(f"loading: {published.detail}")
        if started is None and state.phase == "running":
            started = now
        if started is None:
            show(
                f"pending: {state.reason or 'in the queue'}"
                if state.phase != "unknown"
                else "waiting for the scheduler"
            )
            if config.queue_timeout is not None and now > submitted + config.queue_timeout:
                raise DeploymentTimeoutError(
                    f"job {job.id} is still in the queue after queue_timeout={config.queue_timeout:.0f} s"
                    f" ({state.reason or 'no reason given'}); it was cancelled",
                    deployment_name=entry.deployment_name,
                )
        elif published is None or published.state == DeploymentState.PENDING:
            show("starting: the ranks are meeting")
        if started is not None and now > started + config.startup_timeout:
            detail = (published.detail if published is not None else "") or "its ranks have not met"
            raise DeploymentTimeoutError(
                f"job {job.id} is not ready after startup_timeout={config.startup_timeout:.0f} s ({detail}); "
                "it was cancelled",
                deployment_name=entry.deployment_name,
            )
        time.sleep(POLL_SECONDS if started is not None else PENDING_POLL_SECONDS)


def _died(run: RunDir, entry: Entry, job: Job, state: JobState) -> DeploymentFailedError:
    log_tail = next((text for text in map(tail, run.outputs()) if text.strip()), "")
    name = state.name or "gone"
    return DeploymentFailedError(
        f"job {job.id} of deployment '{entry.deployment_name}' ended before it was ready (state {name}"
        + (f", {state.reason})" if state.reason not in ("", "None") else ")"),
        deployment_name=entry.deployment_name,
        job_id=job.id,
        state=name,
        log=log_tail,
    )


@contextlib.contextmanager
def _shown(entry: Entry) -> Iterator[Callable[[str], None]]:
    """Yield what shows progress: a line on a terminal that is updated, and a line in the log at each change."""
    shown, began = "", time.monotonic()
    console = Console(stderr=True)
    with console.status("") if sys.stderr.isatty() else contextlib.nullcontext() as line:

        def show(sentence: str) -> None:
            nonlocal shown
            if sentence != shown:
                shown = sentence
                # A reason that is explained is one that waiting alone does not mend.
                level = logging.WARNING if sentence.startswith("pending: ") and ": " in sentence[9:] else logging.INFO
                log.log(level, "deployment '%s' (job %s): %s", entry.deployment_name, entry.job_id, sentence)
            if line is not None:
                seconds = time.monotonic() - began
                line.update(f"{entry.deployment_name} (job {entry.job_id}), {seconds:.0f} s: {sentence}")

        yield show
