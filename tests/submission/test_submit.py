import grp
import json
import os
import pickle
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import submitit

from mii_hpc.config import SlurmConfig, resolve
from mii_hpc.deployments import credentials
from mii_hpc.deployments.registry import STALE_SECONDS, Registry
from mii_hpc.errors import ConfigError, DeploymentExistsError, RegistryError, SubmissionError
from mii_hpc.placement import place
from mii_hpc.submission import submit as submission
from mii_hpc.submission.submit import (
    JobState,
    LocalJob,
    SlurmJob,
    check,
    is_live,
    job_of,
    prepare,
    slurm_parameters,
    submit,
)

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


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Put commands on PATH that answer as the test says: slurm(sbatch="shell script", ...)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def commands(**scripts):
        for name, script in {"srun": "exit 1", **scripts}.items():
            path = folder / name
            path.write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\n{script}\n')
            path.chmod(0o755)
        return folder

    commands(
        sbatch="echo Submitted batch job 4711",
        squeue='echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1',
        scancel="exit 0",
    )
    return commands


@pytest.fixture
def config(tmp_path):
    def make(**fields):
        given = {"inference_engine_config": {"engine": "echo"}, "home": tmp_path / "home", "cluster": "slurm"}
        return resolve(**{**given, "deployment_name": "chat", **fields})

    return make


def submitted(config):
    config, placement = check(config)
    run, entry = prepare(config)
    return run, submit(run, entry, config, placement)


def batch_script(run, job_id="4711"):
    return (run.submitit / f"{job_id}_submission.sh").read_text()


def entries_of(home):
    return [entry.deployment_name for entry in Registry(home).entries()]


def calls(slurm):
    file = slurm() / "calls"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize(
    ("golden", "fields"),
    [
        ("default.sbatch", {}),
        ("everything.sbatch", {"tensor_parallel": 2, "replica_num": 4, "slurm": EVERYTHING}),
    ],
)
def test_the_batch_script(slurm, config, golden, fields, request):
    run, _ = submitted(config(**fields))
    text = batch_script(run).replace(str(run.path), "RUN_DIR").replace(shlex.quote(sys.executable), "PYTHON")
    file = GOLDEN / golden
    if request.config.getoption("--golden"):
        file.write_text(text)
    assert text == file.read_text(), "run pytest with --golden to accept the new text, after reading the difference"


def test_every_slurm_setting_reaches_the_batch_script(slurm, config):
    """So that a field added to SlurmConfig is not forgotten."""
    assert set(EVERYTHING) == set(SlurmConfig.model_fields)
    fields = {"tensor_parallel": 2, "replica_num": 4}
    everything = batch_script(submitted(config(**fields, slurm=EVERYTHING))[0])
    for name in EVERYTHING:
        without = {field: value for field, value in EVERYTHING.items() if field != name}
        run, _ = submitted(config(**fields, slurm=without, deployment_name=f"without-{name}".replace("_", "-")))
        plain = re.sub(r"without-[\w-]*|chat[\w-]*", "NAME", batch_script(run))
        assert plain != re.sub(r"chat[\w-]*", "NAME", everything), name


def test_the_parameters_are_submitits(config):
    everything = config(tensor_parallel=2, replica_num=4, slurm=EVERYTHING)
    executor = submitit.SlurmExecutor.__new__(submitit.SlurmExecutor)
    assert set(slurm_parameters(everything, place(everything.model_conf, everything.slurm))) <= (
        executor._valid_parameters()
    )


def test_the_entry_of_a_submitted_job(slurm, config):
    run, entry = submitted(config())
    assert entry.job_id == "4711"
    assert Registry(run.path.parents[1]).get("chat") == entry
    assert (entry.state, entry.address, entry.cluster, entry.job_host) == ("pending", "", "slurm", "")


def test_no_secret_leaves_its_file(slurm, config):
    run, _ = submitted(config())
    secrets = {
        run.tls_key.read_bytes().splitlines()[1],
        *(file.read_bytes().strip() for file in (run.owner_token, run.guest_token, run.rank_token)),
    }
    assert len(secrets) == 4
    holders = {
        path.name
        for path in run.path.parents[1].rglob("*")
        if path.is_file() and any(secret in path.read_bytes() for secret in secrets)
    }
    assert holders == {"tls.key", "owner-token", "guest-token", "rank-token"}
    assert any(path.suffix == ".pkl" for path in run.submitit.iterdir())


def test_everything_submitit_writes_is_closed_to_others(slurm, config):
    run, _ = submitted(config())
    assert run.submitit.stat().st_mode & 0o777 == 0o700
    assert run.path.stat().st_mode & 0o777 == 0o700


def test_what_sbatch_refuses_comes_back_as_it_said_it(slurm, config):
    slurm(sbatch='echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1')
    chat = config()
    with pytest.raises(SubmissionError, match="sbatch: error: invalid partition specified: gpu"):
        submitted(chat)
    assert entries_of(chat.home) == []
    assert list((chat.home / "runs").iterdir()) == []
    slurm(sbatch="echo Submitted batch job 4712")
    assert submitted(chat)[1].job_id == "4712", "the name is free again"


def test_nothing_stays_shared_when_sbatch_refuses(slurm, config):
    slurm(sbatch="exit 1")
    chat = config(share=f"group:{grp.getgrgid(os.getegid()).gr_name}")
    run, entry = prepare(chat)
    assert (chat.home / "shared" / "chat" / "token").exists()
    with pytest.raises(SubmissionError):
        submit(run, entry, chat, place(chat.model_conf, chat.slurm))
    assert list((chat.home / "shared").iterdir()) == []


def test_a_share_that_cannot_be_made_leaves_the_name_free(slurm, config):
    chat = config(share="group:no_such_group_here")
    with pytest.raises(ConfigError, match=r"^share='group:no_such_group_here': "):
        prepare(chat)
    assert entries_of(chat.home) == []
    assert list((chat.home / "runs").iterdir()) == []


def test_an_answer_that_makes_no_sense_is_a_refusal(slurm, config):
    slurm(sbatch="echo hello")
    with pytest.raises(SubmissionError, match="hello"):
        submitted(config())


def test_a_live_name_is_refused_before_sbatch(slurm, config):
    slurm(squeue='echo "PENDING|Priority"')
    chat = config()
    submitted(chat)
    with pytest.raises(DeploymentExistsError, match=r"^deployment_name='chat': taken by job 4711, which is pending"):
        submitted(chat)
    assert sum(call.startswith("sbatch") for call in calls(slurm)) == 1
    assert len(list((chat.home / "runs").iterdir())) == 1


def test_a_stale_entry_does_not_block_the_name(slurm, config):
    submitted(config())
    slurm(sbatch="echo Submitted batch job 4712")
    assert submitted(config())[1].job_id == "4712"


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"inference_engine_config": {}, "model_name_or_path": "/no/such/model"}, "no such folder"),
        ({"tensor_parallel": 4, "slurm": {"tasks_per_node": 3}}, r"slurm\.tasks_per_node=3"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_made(slurm, config, fields, refusal):
    wrong = config(**fields)
    with pytest.raises(ConfigError, match=refusal):
        submitted(wrong)
    assert not wrong.home.exists()
    assert calls(slurm) == []


def test_a_home_open_to_others_is_refused_before_sbatch(slurm, config):
    chat = config()
    chat.home.mkdir(mode=0o700)
    chat.home.chmod(0o777)
    with pytest.raises(RegistryError, match="chmod 700"):
        submitted(chat)
    assert calls(slurm) == []


def test_auto_takes_slurm_where_sbatch_is(slurm, config, monkeypatch, tmp_path):
    assert check(config(cluster="auto"))[0].cluster == "slurm"
    (slurm() / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(slurm()))
    assert check(config(cluster="auto"))[0].cluster == "local"
    with pytest.raises(SubmissionError, match=r"^cluster='slurm': there is no sbatch on PATH"):
        check(config())


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
    monkeypatch.setattr(submission, "COMMAND_SECONDS", 0.1)
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


# Whether a deployment is alive.


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
def test_a_deployment_is_live_by_its_job_and_its_heartbeat(slurm, config, squeue, state, beat, alive):
    _, entry = submitted(config())
    slurm(squeue=squeue)
    assert is_live(entry.model_copy(update={"state": state, "heartbeat": time.time() - beat})) is alive


def test_a_claim_without_a_job_is_live_for_a_minute(slurm, config):
    _, entry = prepare(check(config())[0])
    assert entry.job_id == ""
    assert is_live(entry)
    assert not is_live(entry.model_copy(update={"heartbeat": time.time() - STALE_SECONDS - 1}))


def test_inside_a_job_the_entry_names_it(slurm, config, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    assert prepare(check(config())[0])[1].job_id == "99"


# Jobs on one machine.


@pytest.fixture
def controller(tmp_path):
    """A process like submitit's controller of a local job, and the job that stands for it."""
    process = subprocess.Popen(["sh", "-c", "read _", "controller", str(tmp_path)], stdin=subprocess.PIPE)
    yield process, LocalJob(str(process.pid), socket.gethostname(), tmp_path)
    process.kill()
    process.wait()


def test_a_local_job_goes_by_its_process(controller, tmp_path):
    process, job = controller
    assert job.state().phase == "running"
    assert LocalJob(job.id, job.host, tmp_path / "other").state().phase == "gone", "its process id was used again"
    assert LocalJob(job.id, "elsewhere", tmp_path).state() == JobState("unknown", reason="it runs on elsewhere")
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert job.state().phase == "gone", "a zombie is dead"
    process.wait()
    assert job.state().phase == "gone"


def test_cancelling_a_local_job(controller, tmp_path):
    process, job = controller
    LocalJob(job.id, job.host, tmp_path / "other").cancel()
    assert job.state().phase == "running", "somebody else's process is left alone"
    job.cancel()
    assert process.wait(10) == -signal.SIGTERM
    job.cancel()


def test_the_job_behind_an_entry(slurm, config):
    _, entry = submitted(config())
    assert job_of(entry) == SlurmJob("4711")
    local = entry.model_copy(update={"cluster": "local", "job_id": "7", "job_host": "here"})
    assert job_of(local) == LocalJob("7", "here", entry.run_dir)


def test_a_local_submission_survives_ctrl_c(config, monkeypatch):
    """The controller is started with SIGINT and SIGHUP blocked, and in no job of ours."""
    chat = config(cluster="local")
    seen = {}

    class Executor:
        def __init__(self, folder, python):
            seen["folder"], seen["mode"] = folder, stat.S_IMODE(Path(folder).stat().st_mode)

        def update_parameters(self, **parameters):
            seen.update(parameters)

        def submit(self, function, *arguments):
            seen["streams"] = [str(Path(f"/proc/self/fd/{number}").readlink()) for number in range(3)]
            seen["blocked"] = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            seen["pickle"] = pickle.dumps((function, arguments))
            seen["arguments"] = arguments
            return type("Job", (), {"job_id": "1"})

    monkeypatch.setattr(submitit, "LocalExecutor", Executor)
    run, entry = submitted(chat)
    assert seen["blocked"] >= {signal.SIGINT, signal.SIGHUP}
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGHUP}
    assert seen["streams"] == [os.devnull, str(run.controller_log), str(run.controller_log)]
    assert str(Path("/proc/self/fd/1").readlink()) != str(run.controller_log)
    assert seen["mode"] == 0o700
    assert seen["arguments"] == (str(run.path), os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert (entry.job_id, entry.cluster, entry.job_host) == ("1", "local", socket.gethostname())
    assert credentials.load_owner(run).token.encode() not in seen["pickle"]


def test_the_configuration_is_in_the_run_directory(slurm, config):
    run, _ = submitted(config(tensor_parallel=2))
    assert json.loads(run.config.read_text())["model_conf"]["tensor_parallel"] == 2
    assert run.load_config().cluster == "slurm"
