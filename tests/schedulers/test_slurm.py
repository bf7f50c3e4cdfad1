import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import submitit

from mii_hpc.config import SlurmConfig, resolve
from mii_hpc.deployments.registry import Registry
from mii_hpc.errors import ConfigError, SubmissionError
from mii_hpc.placement import place
from mii_hpc.schedulers import JobState
from mii_hpc.schedulers import slurm as slurm_module
from mii_hpc.schedulers.base import setup_script
from mii_hpc.schedulers.slurm import Allocation, Slurm, SlurmJob, executor_parameters, own_allocation
from tests.submitting import calls, submitted
from tests.waiting import eventually

GOLDEN = Path(__file__).with_name("golden")
EVERYTHING = {
    "partition": "gpu",
    "account": "physics",
    "qos": "high",
    "time": "8:00:00",
    "gpus_per_node": 8,
    "gres": "nvme:1",
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


# GPUs.

TWO_PARTITIONS = "printf 'batch*|9|(null)|\\ngpu|8|gpu:a100:4(S:0-1)|\\n'"


@pytest.fixture
def fitted(slurm, tmp_path):
    """Fill in what the cluster has: the batch script's directives, and the device, of a deployment of a real engine."""

    def fit(sinfo=TWO_PARTITIONS, **fields):
        slurm(sinfo=sinfo)
        shape = {"tensor_parallel": 2, "replica_num": 2, **fields}
        config = Slurm().fit(resolve("model", cluster="slurm", home=tmp_path, **shape))
        parameters = executor_parameters(config, place(config.model_conf, config.slurm))
        given = {**parameters, **parameters["additional_parameters"]}
        kept = ("nodes", "ntasks_per_node", "gres", "gpus_per_node", "gpus")
        return {name: given[name] for name in kept if given.get(name)} | {"device": config.model_conf.device}

    return fit


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"slurm": {"partition": "gpu"}}, {"nodes": 1, "ntasks_per_node": 4, "gres": "gpu:a100:4", "device": "cuda"}),
        (
            {"slurm": {"extra": {"partition": "gpu"}}, "replica_num": 3},
            {"nodes": 2, "ntasks_per_node": 4, "gres": "gpu:a100:4", "device": "cuda"},
        ),
        (
            {"slurm": {"partition": "gpu", "gres": "nvme:1"}, "replica_num": 1},
            {"nodes": 1, "ntasks_per_node": 2, "gres": "nvme:1,gpu:a100:2", "device": "cuda"},
        ),
        (
            {"slurm": {"partition": "gpu", "tasks_per_node": 2}},
            {"nodes": 2, "ntasks_per_node": 2, "gres": "gpu:a100:2", "device": "cuda"},
        ),
        # What the user says comes first.
        ({"slurm": {"partition": "gpu"}, "device": "cpu"}, {"nodes": 2, "ntasks_per_node": 2, "device": "cpu"}),
        (
            {"slurm": {"partition": "gpu", "gpus_per_node": 0}},
            {"nodes": 2, "ntasks_per_node": 2, "device": "cpu"},
        ),
        (
            {"slurm": {"partition": "gpu", "gpus_per_node": 2}},
            {"nodes": 2, "ntasks_per_node": 2, "gpus_per_node": 2, "device": "auto"},
        ),
        (
            {"slurm": {"partition": "gpu", "gres": "gpu:v100:8"}},
            {"nodes": 1, "ntasks_per_node": 4, "gres": "gpu:v100:8", "device": "auto"},
        ),
        (
            {"slurm": {"extra": {"gpus-per-node": "v100:4"}}},
            {"nodes": 1, "ntasks_per_node": 4, "gres": "gpu:v100:4", "device": "auto"},
        ),
        (
            {"slurm": {"partition": "gpu", "extra": {"gpus": 4}}},
            {"nodes": 2, "ntasks_per_node": 2, "gpus": 4, "device": "auto"},
        ),
    ],
)
def test_the_gpus_that_are_asked_for(fitted, fields, asked):
    assert fitted(**fields) == asked


def test_the_environment_says_what_sbatch_reads_from_it(fitted, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    assert fitted()["gres"] == "gpu:a100:4"
    assert fitted(slurm={"partition": "batch"})["gres"] == "gpu:a100:4", "sbatch puts the environment first"
    monkeypatch.setenv("SBATCH_GPUS_PER_NODE", "1")
    assert "gres" not in fitted()


def test_gpus_that_will_be_idle_are_told_of(fitted, caplog):
    fitted(replica_num=3, slurm={"partition": "gpu"})
    assert caplog.messages == [
        "2 of the job's 8 GPUs will be idle: every node gets 4, and 3 replicas do not divide over 2 nodes"
    ]


def test_what_only_sounds_like_asking_for_gpus(fitted):
    assert fitted(slurm={"partition": "gpu", "extra": {"gres-flags": "enforce-binding"}})["gres"] == "gpu:a100:4"


def test_a_constraint_without_gpus_is_told_of(fitted, caplog):
    mixed = "printf 'gpu|9|(null)|cpu\\ngpu|8|gpu:a100:4(S:0-1)|a100\\n'"
    assert "gres" not in fitted(mixed, slurm={"partition": "gpu", "constraint": "cpu"})
    assert caplog.messages[0].startswith("partition 'gpu' with constraint 'cpu' has no GPUs; ")


def test_a_partition_without_gpus_is_told_of(fitted, caplog):
    assert fitted() == {"nodes": 2, "ntasks_per_node": 2, "device": "auto"}
    assert caplog.messages == [
        "the default partition has no GPUs; partitions that have some: 'gpu' (slurm.partition); here the model is "
        "served on CPUs"
    ]
    sentence = r"^device='cuda': partition 'batch' has no GPUs; partitions that have some: 'gpu' \(slurm\.partition\)$"
    with pytest.raises(ConfigError, match=sentence):
        fitted(device="cuda", slurm={"partition": "batch"})


def test_a_cluster_that_knows_of_no_gpus_may_have_some(fitted, caplog):
    assert fitted("echo 'batch*|9|(null)|'", device="cuda") == {"nodes": 2, "ntasks_per_node": 2, "device": "cuda"}
    assert caplog.messages == []


def test_a_partition_that_does_not_exist_is_left_to_sbatch(fitted, caplog):
    assert fitted(slurm={"partition": "gpuu"})["device"] == "auto"
    assert caplog.messages == []


def test_the_nodes_asked_for_are_those_that_are_looked_at(fitted, slurm):
    fitted(slurm={"partition": "gpu", "nodelist": "g[1-2]"})
    assert calls(slurm)[-1] == "sinfo --all --noheader --format=%P|%D|%G|%f --nodes=g[1-2]"


@pytest.mark.parametrize("sinfo", ['echo "sinfo: error: no controller" >&2; exit 1', "exec sleep 60"])
def test_without_an_answer_no_gpu_is_asked_for(fitted, caplog, monkeypatch, sinfo):
    monkeypatch.setattr(slurm_module, "COMMAND_SECONDS", 0.1 if "sleep" in sinfo else 30)
    assert fitted(sinfo) == {"nodes": 2, "ntasks_per_node": 2, "device": "auto"}
    assert caplog.messages[0].startswith("no GPU is asked for, since sinfo does not say whether there are any: ")


def test_what_extra_says_of_a_field_must_not_contradict_it():
    with pytest.raises(ConfigError, match=r"^slurm: extra\['gres'\]='gpu:4': gres='gpu:2' says otherwise; give one"):
        resolve("model", slurm={"gres": "gpu:2", "extra": {"gres": "gpu:4"}})
    assert resolve("model", slurm={"gres": None, "extra": {"gres": "gpu:4"}}).slurm.gpus == 4


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
    told = (tmp_path / "environment").read_text().splitlines()
    handed_on = dict(line.split("=", 1) for line in told if "=" in line)  # some values have several lines
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


def test_reasons_that_waiting_does_not_mend_are_explained(slurm):
    slurm(squeue="echo 'PENDING|PartitionNodeLimit'")
    assert SlurmJob("1").state().reason.startswith("PartitionNodeLimit: the job asks for more than the partition")
    slurm(squeue="echo 'PENDING|Priority'")
    assert SlurmJob("1").state().reason == "Priority"


def test_a_suspended_job_is_not_expected_to_give_signs_of_life(slurm):
    slurm(squeue="echo 'SUSPENDED|None'")
    assert SlurmJob("1").state().phase == "pending"


@pytest.mark.parametrize(
    ("lines", "status", "says"),
    [
        (["export A=1", "false || true", "ls /nonexistent"], 2, "'ls /nonexistent' ended with status 2"),
        (["exit 3"], 3, "'exit 3' ended with status 3"),
        (["export A=1"], 0, ""),
        ([], 0, ""),
    ],
)
def test_a_setup_line_that_fails_ends_the_job_and_is_named(lines, status, says):
    script = "\n".join([*setup_script(lines), "echo on"])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    said = f"mii_hpc: slurm.setup: {says}\n" if says else "on\n"
    assert (done.returncode, done.stdout) == (status, said)


def test_a_job_that_slurm_counts_another_start_of_is_requeued(slurm, monkeypatch):
    slurm(squeue="echo '2      '")
    assert SlurmJob("1").is_requeued()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert not SlurmJob("1").is_requeued()
    assert SlurmJob("1").incarnation == 2
    slurm(squeue="exit 1")
    assert not SlurmJob("1").is_requeued()


def test_a_rank_that_is_started_again_imports_nothing_from_its_working_directory(slurm, echo_config):
    config = echo_config()
    run, _ = submitted(config)
    assert SlurmJob("4711").start_rank(run, config, 2, "node3")
    eventually(lambda: [call for call in calls(slurm) if call.startswith("srun --jobid")], what="srun is called")
    (call,) = [call for call in calls(slurm) if call.startswith("srun --jobid")]
    assert call.endswith(f"{sys.executable} -P -m mii_hpc.job.rank {run.path} 2")
    assert "--nodelist=node3" in call


def test_no_rank_is_started_on_a_node_that_the_job_has_lost(slurm, echo_config):
    config = echo_config()
    run, _ = submitted(config)
    slurm(squeue="true")
    assert not SlurmJob("4711").start_rank(run, config, 2, "node3")
    assert calls(slurm)[-1] == "squeue --noheader --jobs=4711 --nodelist=node3 --format=%i"


def test_slurm_does_not_tell_the_ranks_of_the_walltime_where_another_job_follows(echo_config):
    config = echo_config(uptime="7-0", slurm={"time": "8:00:00"})
    parameters = executor_parameters(config, place(config.model_conf, config.slurm))
    assert parameters["additional_parameters"]["signal"] == "CONT@1"


@pytest.mark.parametrize(("squeue", "preempted"), [("2026-11-27T11:21:56", True), ("N/A", False), ("", False)])
def test_a_job_with_a_preemption_time_is_preempted(slurm, squeue, preempted):
    slurm(squeue=f"echo '{squeue}'")
    assert SlurmJob("1").is_preempted() is preempted


def test_a_job_that_waits_for_its_time_is_told_to_start(slurm):
    slurm(scontrol="true")
    SlurmJob("7").hasten()
    assert calls(slurm)[-1] == "scontrol update JobId=7 StartTime=now"
