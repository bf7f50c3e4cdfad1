import logging
import threading
import time

import pytest

from mii_hpc.config import resolve
from mii_hpc.deployments.registry import Registry
from mii_hpc.deployments.rundir import Failure
from mii_hpc.deployments.state import DeploymentState
from mii_hpc.errors import DeploymentFailedError, DeploymentTimeoutError
from mii_hpc.schedulers import JobState
from mii_hpc.submission import startup
from mii_hpc.submission import submit as submission


class Job:
    """A job whose state the test sets."""

    id = "4711"

    def __init__(self):
        self.now = JobState("pending", "PENDING", "Priority")
        self.cancelled = 0
        self.asked = 0
        self.steps = []

    def state(self):
        """Take the next step, but for the first time; then tell."""
        self.asked += 1
        if self.asked > 1 and self.steps:
            self.steps.pop(0)()
        return self.now

    def cancel(self):
        self.cancelled += 1
        self.now = JobState("gone", "CANCELLED")


class Submitted:
    """A deployment that was submitted as that job, and somebody who waits for it."""

    def __init__(self, home, job):
        self.job = job
        self.config = resolve(
            deployment_name="chat", inference_engine_config={"engine": "echo"}, home=home, cluster="local"
        )
        self.run, self.entry = submission.prepare(self.config)
        self.registry = Registry(self.config.home)

    def publish(self, **fields):
        if "state" in fields:
            fields["state"] = DeploymentState(fields["state"])
        self.entry = self.entry.model_copy(update={"job_id": Job.id, "heartbeat": time.time(), **fields})
        self.registry.publish(self.entry)

    def wait(self, **config):
        startup.wait_until_ready(self.run, self.entry, self.config.model_copy(update=config))

    def soon(self, *steps):
        """Take each step when the scheduler is asked again."""
        self.job.steps += steps


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    job = Job()
    monkeypatch.setattr(startup, "job_of", lambda _entry: job)
    monkeypatch.setattr(startup, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(startup, "SCHEDULER_SECONDS", (0.01, 0.01))
    return Submitted(tmp_path / "home", job)


def became(phase, name="", reason=""):
    return JobState(phase, name, reason)


def test_it_waits_until_ready_and_says_for_what(submitted, caplog):
    caplog.set_level(logging.INFO, "mii_hpc.submission.startup")
    submitted.soon(
        lambda: setattr(submitted.job, "now", became("running")),
        lambda: submitted.publish(state="loading", detail="1 of 2 replicas ready"),
        lambda: submitted.publish(state="ready"),
    )
    submitted.wait()
    said = [record.getMessage().rpartition(") : ")[2].rpartition("): ")[2] for record in caplog.records]
    assert said == ["pending: Priority", "starting: the ranks are meeting", "loading: 1 of 2 replicas ready"]
    assert submitted.job.cancelled == 0
    assert submitted.registry.get("chat").state == "ready"


@pytest.mark.parametrize("wrote", ["submitit/4711_0_log.out", "logs/rank-0.log", "logs/engine-0.log"])
def test_a_job_that_dies_shows_its_last_words_at_once(submitted, wrote):
    (submitted.run.path / wrote).write_text("Traceback (most recent call last):\nImportError: no MPI here\n")
    submitted.job.now = became("gone", "FAILED", "NonZeroExitCode")
    with pytest.raises(DeploymentFailedError) as failure:
        submitted.wait()
    assert submitted.job.asked <= 2, "once to wait, once for its phase after it was cancelled"
    error = failure.value
    assert (error.deployment_name, error.job_id, error.state) == ("chat", "4711", "FAILED")
    assert str(error) == (
        "job 4711 of deployment 'chat' ended before it was ready (state FAILED, NonZeroExitCode)\n"
        "Traceback (most recent call last):\nImportError: no MPI here\n"
    )
    assert submitted.registry.get("chat") is None


def test_a_rank_that_fails_shows_its_own_message(submitted):
    submitted.job.now = became("running")
    submitted.soon(lambda: submitted.run.write_failure(Failure(3, "node7", "rank 3: no weights", "Traceback ...")))
    with pytest.raises(DeploymentFailedError) as failure:
        submitted.wait()
    assert str(failure.value) == (
        "job 4711 of deployment 'chat' failed while starting: rank 3: no weights\nTraceback ..."
    )
    assert (failure.value.deployment_name, failure.value.log) == ("chat", "Traceback ...")
    assert submitted.job.cancelled == 1, "what is left of it does not keep its allocation"


def test_the_queue_has_a_timeout_when_asked_for(submitted):
    with pytest.raises(
        DeploymentTimeoutError, match=r"^job 4711 is still in the queue after queue_timeout=0 s \(Priority\); it was"
    ) as failure:
        submitted.wait(queue_timeout=0.05, startup_timeout=0.01)
    assert failure.value.deployment_name == "chat"
    assert submitted.job.cancelled == 1
    assert submitted.registry.get("chat") is None


def test_the_queue_does_not_count_as_starting(submitted):
    submitted.soon(lambda: time.sleep(0.1), lambda: submitted.publish(state="ready"))
    submitted.wait(startup_timeout=0.05)


@pytest.mark.parametrize(
    ("state", "detail", "says"),
    [
        ("pending", "", r"\(its ranks have not met\)"),
        ("loading", "1 of 2 replicas ready", r"\(1 of 2 replicas ready\)"),
    ],
)
def test_starting_has_a_timeout(submitted, state, detail, says):
    submitted.job.now = became("running")
    submitted.publish(state=state, detail=detail)
    with pytest.raises(
        DeploymentTimeoutError, match=rf"^job 4711 is not ready after startup_timeout=0 s {says}.*; it was cancelled$"
    ) as failure:
        submitted.wait(startup_timeout=0.05, queue_timeout=60)
    assert failure.value.deployment_name == "chat"
    assert submitted.job.cancelled == 1


def test_ctrl_c_cancels_the_job(submitted, monkeypatch):
    def interrupt(_seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(startup.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        submitted.wait()
    assert submitted.job.cancelled == 1
    assert submitted.registry.get("chat") is None


def test_a_running_job_withdraws_its_entry_itself(submitted):
    submitted.job.now = became("running")
    submitted.job.cancel = lambda: None
    with pytest.raises(DeploymentTimeoutError):
        submitted.wait(startup_timeout=0.05)
    assert submitted.registry.get("chat") is not None


def test_a_scheduler_that_does_not_answer_is_waited_for(submitted, caplog):
    caplog.set_level(logging.INFO, "mii_hpc.submission.startup")
    submitted.job.now = became("unknown", reason="Unable to contact slurm controller")
    submitted.soon(lambda: None, lambda: None, lambda: submitted.publish(state="ready"))
    submitted.wait()
    assert "waiting for the scheduler" in caplog.text


def test_the_scheduler_is_asked_sparingly(submitted, monkeypatch):
    monkeypatch.setattr(startup, "SCHEDULER_SECONDS", (60, 60))
    ready = threading.Timer(0.2, lambda: submitted.publish(state="ready"))
    ready.start()
    submitted.wait()
    assert submitted.job.asked == 1


def test_the_entry_of_another_run_is_not_ours(submitted):
    """A stale entry of the same name must not look like readiness."""
    submitted.registry.withdraw(submitted.entry)
    other = submitted.entry.model_copy(update={"run_dir": submitted.run.path / "other", "state": DeploymentState.READY})
    submitted.registry.claim(other, lambda _entry: True)
    with pytest.raises(DeploymentTimeoutError):
        submitted.wait(queue_timeout=0.1)
    assert submitted.registry.get("chat") == other
