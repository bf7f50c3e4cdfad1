import time
from typing import get_args

import pytest

from mii_hpc.deployments.registry import SILENT_SECONDS, STALE_SECONDS, Entry
from mii_hpc.errors import SubmissionError
from mii_hpc.schedulers import choose, is_live, job_of, scheduler, state_of
from mii_hpc.schedulers.local import LocalJob
from mii_hpc.schedulers.slurm import SlurmJob
from mii_hpc.submission import submit as submission
from tests.submitting import submitted


def test_auto_takes_slurm_where_sbatch_is(slurm, monkeypatch):
    assert choose("auto").name == choose("slurm").name == "slurm"
    (slurm() / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(slurm()))
    assert choose("auto").name == choose("local").name == "local"
    with pytest.raises(SubmissionError, match=r"^cluster='slurm': there is no sbatch on PATH"):
        choose("slurm")


def test_every_cluster_of_the_configuration_has_a_scheduler():
    (names,) = {field.annotation for name, field in Entry.model_fields.items() if name == "cluster"}
    assert [scheduler(name).name for name in get_args(names)] == list(get_args(names))


def test_the_job_behind_an_entry(slurm, echo_config):
    _, entry = submitted(echo_config())
    assert job_of(entry) == SlurmJob("4711")
    local = entry.model_copy(update={"cluster": "local", "job_id": "7", "job_host": "here"})
    assert job_of(local) == LocalJob("7", "here", entry.run_dir)


@pytest.mark.parametrize(
    ("squeue", "state", "beat", "alive"),
    [
        ('echo "RUNNING|None"', "ready", 0, True),
        ('echo "RUNNING|None"', "ready", STALE_SECONDS + 1, False),
        ('echo "PENDING|Priority"', "ready", 10**6, True),
        ('echo "RUNNING|None"', "pending", 10**6, True),
        ('echo "COMPLETED|None"', "ready", 0, False),
        ("exit 1", "ready", 0, True),
        ("exit 1", "ready", STALE_SECONDS + 1, False),
        ("exit 1", "pending", 10**6, True),
    ],
)
def test_a_deployment_is_live_by_its_job_and_its_heartbeat(slurm, echo_config, squeue, state, beat, alive):
    _, entry = submitted(echo_config())
    slurm(squeue=squeue)
    assert is_live(entry.model_copy(update={"state": state, "heartbeat": time.time() - beat})) is alive


@pytest.mark.parametrize(
    ("squeue", "written", "beat", "state"),
    [
        ("RUNNING", "ready", 0, "ready"),
        ("RUNNING", "ready", SILENT_SECONDS + 1, "unresponsive"),
        ("RUNNING", "ready", STALE_SECONDS + 1, "ended"),
        ("COMPLETED", "ready", 0, "ended"),
        ("PENDING", "pending", 10**6, "pending"),
    ],
)
def test_the_state_is_what_is_written_unless_nobody_is_left_to_write_it(
    slurm, echo_config, squeue, written, beat, state
):
    _, entry = submitted(echo_config())
    slurm(squeue=f'echo "{squeue}|None"')
    address = "" if written == "pending" else "10.0.0.1:5000"
    update = {"state": written, "heartbeat": time.time() - beat, "address": address}
    assert state_of(entry.model_copy(update=update)) == state


def test_a_claim_without_a_job_is_live_for_a_minute(slurm, echo_config):
    _, entry = submission.prepare(echo_config())
    assert entry.job_id == ""
    assert is_live(entry)
    assert not is_live(entry.model_copy(update={"heartbeat": time.time() - STALE_SECONDS - 1}))
