import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import submitit

from mii_hpc.config import SlurmConfig
from mii_hpc.deployments.registry import Registry
from mii_hpc.errors import ConfigError, SubmissionError
from mii_hpc.placement import place
from mii_hpc.schedulers import JobState
from mii_hpc.schedulers import slurm as slurm_module
from mii_hpc.schedulers.slurm import Allocation, SlurmJob, executor_parameters, own_allocation
from tests.submitting import calls, submitted

GOLDEN = Path(__file__).with_name("golden")
EVERYTHING = {
    "partition": "gpu",
    "account": "physics",
    "qos": "high",
    "time": "8:00:00",
    "gpus_per_node": 8,
    "cpus_per_task": 6,
    "mem": "500G",
    "constraint": "a100",
    "reservation": "course",
    "nodelist": "node[1-4]",
    "exclude": "node3",
    "exclusive": True,
    "tasks_per_node": 4,
    "mpi": "pmi2",
    "srun_args": ["--export=ALL", "--comment=two words"],
    "setup": ["module load openmpi", "export HF_HOME=/scratch/hf"],
    "python": "apptainer exec image.sif python",
    "extra": {"mail-type": "FAIL", "hint": "nomultithread", "no-requeue": True},
}


def batch_script(run, job_id="4711"):
    return (run.submitit / f"{job_id}_submission.sh").read_text()


def entries_of(home):
    return [entry.deployment_name for entry in Registry(home).entries()]


@pytest.mark.parametrize(
    ("golden", "fields"),
    [
        ("default.sbatch", {}),
        ("everything.sbatch", {"tensor_parallel": 2, "replica_num": 4, "slurm": EVERYTHING}),
    ],
)
def test_the_batch_script(slurm, echo_config, golden, fields, request):
    run, _ = submitted(echo_config(**fields))
    text = batch_script(run).replace(str(run.path), "RUN_DIR").replace(shlex.quote(sys.executable), "PYTHON")
    file = GOLDEN / golden
    if request.config.getoption("--golden"):
        file.write_text(text)
    assert text == file.read_text(), "run pytest with --golden to accept the new text, after reading the difference"


def test_every_slurm_setting_reaches_the_batch_script(slurm, echo_config):
    """So that a field added to SlurmConfig is not forgotten."""
    assert set(EVERYTHING) == set(SlurmConfig.model_fields)
    fields = {"tensor_parallel": 2, "replica_num": 4}
    everything = batch_script(submitted(echo_config(**fields, slurm=EVERYTHING))[0])
    for name in EVERYTHING:
        without = {field: value for field, value in EVERYTHING.items() if field != name}
        run, _ = submitted(echo_config(**fields, slurm=without, deployment_name=f"without-{name}".replace("_", "-")))
        plain = re.sub(r"without-[\w-]*|chat[\w-]*", "NAME", batch_script(run))
        assert plain != re.sub(r"chat[\w-]*", "NAME", everything), name


def test_the_parameters_are_submitits(echo_config):
    everything = echo_config(tensor_parallel=2, replica_num=4, slurm=EVERYTHING)
    executor = submitit.SlurmExecutor.__new__(submitit.SlurmExecutor)
    assert set(executor_parameters(everything, place(everything.model_conf, everything.slurm))) <= (
        executor._valid_parameters()
    )


def test_what_sbatch_refuses_comes_back_as_it_said_it(slurm, echo_config):
    slurm(sbatch='echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1')
    chat = echo_config()
    with pytest.raises(SubmissionError, match="sbatch: error: invalid partition specified: gpu"):
        submitted(chat)
    assert entries_of(chat.home) == []
    assert list((chat.home / "runs").iterdir()) == []
    slurm(sbatch="echo Submitted batch job 4712")
    assert submitted(chat)[1].job_id == "4712", "the name is free again"


def test_an_answer_that_makes_no_sense_is_a_refusal(slurm, echo_config):
    slurm(sbatch="echo hello")
    with pytest.raises(SubmissionError, match="hello"):
        submitted(echo_config())


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ('echo "PENDING|Priority"', JobState("pending", "PENDING", "Priority")),
        ('echo "REQUEUED|None"', JobState("pending", "REQUEUED", "None")),
        ('echo "CONFIGURING|None"', JobState("running", "CONFIGURING", "None")),
        ('echo "RUNNING|None"', JobState("running", "RUNNING", "None")),
        ('echo "FAILED|NonZeroExitCode"', JobState("gone", "FAILED", "NonZeroExitCode")),
        ('echo "OUT_OF_MEMORY|OutOfMemory"', JobState("gone", "OUT_OF_MEMORY", "OutOfMemory")),
        ("true", JobState("gone")),
    ],
)
def test_the_state_of_a_slurm_job(slurm, answer, state):
    slurm(squeue=answer)
    assert SlurmJob("7").state() == state
    assert "--jobs=7" in calls(slurm)[-1]


def test_a_job_that_slurm_has_forgotten_is_gone(slurm):
    state = SlurmJob("7").state()
    assert (state.phase, state.reason) == ("gone", "slurm_load_jobs error: Invalid job id specified")


def test_a_scheduler_that_does_not_answer_is_unknown(slurm, monkeypatch):
    slurm(squeue='echo "Unable to contact slurm controller" >&2; exit 1')
    assert SlurmJob("7").state() == JobState("unknown", reason="Unable to contact slurm controller")
    monkeypatch.setattr(slurm_module, "COMMAND_SECONDS", 0.1)
    slurm(squeue="exec sleep 60", scancel="exec sleep 60")
    assert SlurmJob("7").state().phase == "unknown"
    SlurmJob("7").cancel()
    (slurm() / "squeue").unlink()
    monkeypatch.setenv("PATH", str(slurm()))
    assert SlurmJob("7").state().phase == "unknown"


def test_cancelling_a_slurm_job(slurm):
    SlurmJob("7").cancel()
    assert calls(slurm) == ["scancel 7"]


def test_the_end_of_a_slurm_job(slurm):
    slurm(squeue="echo 1700000000")
    assert SlurmJob("7").ends() == 1700000000
    for answer in ("echo N/A", "true", "exit 1"):
        slurm(squeue=answer)
        assert SlurmJob("7").ends() is None


# Inside of other jobs.


def test_a_job_around_us_does_not_leak_into_ours(slurm, echo_config, monkeypatch, tmp_path):
    slurm(sbatch=f"env > {tmp_path}/environment; echo Submitted batch job 4711")
    around = {"SLURM_JOB_ID": "99", "SLURM_NTASKS": "8", "SLURM_MEM_PER_NODE": "1000", "RANK": "3"}
    asked_for = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "physics"}
    for name, value in {**around, **asked_for}.items():
        monkeypatch.setenv(name, value)
    _, entry = submitted(echo_config())
    assert entry.job_id == "4711"
    handed_on = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines())
    assert not around.keys() & handed_on.keys()
    assert asked_for.items() <= handed_on.items()
    assert around.items() <= os.environ.items(), "this process is still in its job"


def test_what_a_batch_script_has_been_given(monkeypatch):
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    with pytest.raises(ConfigError, match=r"^SLURM_NTASKS is not set: this is for batch scripts"):
        own_allocation()
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert own_allocation() == Allocation("99", 8)
