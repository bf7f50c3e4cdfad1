import errno
import grp
import json
import os
from datetime import UTC, datetime

import pytest

from mii_hpc.deployments import sharing
from mii_hpc.deployments.registry import Registry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.errors import ConfigError, DeploymentExistsError, RegistryError, SubmissionError
from mii_hpc.placement import place
from mii_hpc.submission import submit as submission
from mii_hpc.submission.submit import check, prepare, submit
from tests.submitting import calls, submitted

GROUP = grp.getgrgid(os.getegid()).gr_name


def entries_of(home):
    return [entry.deployment_name for entry in Registry(home).entries()]


def test_the_entry_of_a_submitted_job(slurm, echo_config):
    run, entry = submitted(echo_config())
    assert entry.job_id == "4711"
    assert Registry(run.path.parents[1]).get("chat") == entry
    assert (entry.state, entry.address, entry.cluster, entry.job_host) == ("pending", "", "slurm", "")


def test_no_secret_leaves_its_file(slurm, echo_config):
    run, _ = submitted(echo_config())
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


def test_everything_submitit_writes_is_closed_to_others(slurm, echo_config):
    run, _ = submitted(echo_config())
    assert run.submitit.stat().st_mode & 0o777 == 0o700
    assert run.path.stat().st_mode & 0o777 == 0o700


def test_nothing_stays_shared_when_sbatch_refuses(slurm, echo_config):
    slurm(sbatch="exit 1")
    chat = echo_config(share=f"group:{GROUP}")
    run, entry = prepare(chat)
    assert (chat.home / "shared" / "chat" / "token").exists()
    with pytest.raises(SubmissionError):
        submit(run, entry, chat, place(chat.model_conf, chat.slurm))
    assert list((chat.home / "shared").iterdir()) == []


def test_a_share_that_cannot_be_made_leaves_the_name_free(slurm, echo_config):
    chat = echo_config(share="group:no_such_group_here")
    with pytest.raises(ConfigError, match=r"^share='group:no_such_group_here': "):
        prepare(chat)
    assert entries_of(chat.home) == []
    assert list((chat.home / "runs").iterdir()) == []


def test_a_live_name_is_refused_before_sbatch(slurm, echo_config):
    slurm(squeue='echo "PENDING|Priority"')
    chat = echo_config()
    submitted(chat)
    with pytest.raises(DeploymentExistsError, match=r"^deployment_name='chat': taken by job 4711, which is pending"):
        submitted(chat)
    assert sum(call.startswith("sbatch") for call in calls(slurm)) == 1
    assert len(list((chat.home / "runs").iterdir())) == 1


def test_a_stale_entry_does_not_block_the_name(slurm, echo_config):
    submitted(echo_config())
    slurm(sbatch="echo Submitted batch job 4712")
    assert submitted(echo_config())[1].job_id == "4712"


def test_what_a_killed_run_has_shared_does_not_outlive_it(slurm, echo_config):
    chat = echo_config(share=f"group:{GROUP}")
    submit(*prepare(chat), chat, place(chat.model_conf, chat.slurm))
    assert sharing.names(chat.home) == ["chat"]
    submitted(echo_config())
    assert sharing.names(chat.home) == []


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"inference_engine_config": {}, "model_name_or_path": "/no/such/model"}, "no such folder"),
        ({"tensor_parallel": 4, "slurm": {"tasks_per_node": 3}}, r"slurm\.tasks_per_node=3"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_made(slurm, echo_config, fields, refusal):
    wrong = echo_config(**fields)
    with pytest.raises(ConfigError, match=refusal):
        submitted(wrong)
    assert not wrong.home.exists()
    assert calls(slurm) == []


def test_a_home_open_to_others_is_refused_before_sbatch(slurm, echo_config):
    chat = echo_config()
    chat.home.mkdir(mode=0o700)
    chat.home.chmod(0o777)
    with pytest.raises(RegistryError, match="chmod 700"):
        submitted(chat)
    assert calls(slurm) == []


def test_the_entry_names_the_job_that_its_caller_names(slurm, echo_config, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "98")
    assert prepare(check(echo_config()))[1].job_id == "", "a job that happens to be around us is not the deployment's"
    assert prepare(check(echo_config(deployment_name="by-hand")), "99")[1].job_id == "99"


def test_the_configuration_is_in_the_run_directory(slurm, echo_config):
    run, _ = submitted(echo_config(tensor_parallel=2))
    assert json.loads(run.config.read_text())["model_conf"]["tensor_parallel"] == 2
    assert run.load_config().cluster == "slurm"


def test_a_full_home_is_told_of_and_nothing_is_left(echo_config, monkeypatch):
    config = echo_config()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RegistryError, match=r"cannot be written: No space left on device$"):
        submission.prepare(config)
    assert list((config.home / "runs").iterdir()) == []


def test_old_runs_are_removed_unless_they_are_in_use(echo_config, monkeypatch):
    config = echo_config(keep_runs=7)
    used, _ = submission.prepare(config)
    submission.prepare(config.model_copy(update={"deployment_name": "old"}))
    Registry(config.home).withdraw(Registry(config.home).get("old"))
    monkeypatch.setattr(RunDir, "created", property(lambda run: datetime(2020, 1, 1, tzinfo=UTC)))
    new, _ = submission.prepare(config.model_copy(update={"deployment_name": "new"}))
    assert {run.path for run in RunDir.all(config.home)} == {used.path, new.path}


def test_a_requeued_batch_script_prepares_itself_again(echo_config, monkeypatch):
    monkeypatch.setattr(submission.schedulers, "is_live", lambda _entry: True)
    config = echo_config()
    first, _ = submission.prepare(config, "4711")
    second, entry = submission.prepare(config, "4711")
    assert Registry(config.home).get("chat") == entry and entry.run_dir == second.path != first.path
    with pytest.raises(DeploymentExistsError):
        submission.prepare(config, "4712")


def test_an_uptime_needs_a_walltime(echo_config):
    config = echo_config(cluster="local").model_copy(update={"uptime": "7-0"})
    with pytest.raises(ConfigError, match=r"^uptime='7-0': with cluster='local' no job has a walltime"):
        submission.check(config)
