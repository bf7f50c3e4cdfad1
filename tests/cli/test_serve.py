import json

import pytest

from tests.submitting import calls

ECHO = ("--engine", "echo", "--name", "chat")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MII_HPC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_dry_run_shows_the_batch_script_and_what_was_resolved_and_submits_nothing(run, slurm, home):
    options = ("--cluster", "slurm", "--partition", "gpu", "--time", "8:00:00", "--replica-num", 2, "--dry-run")
    ran = run("serve", *ECHO, *options)
    assert ran.status == 0
    assert "#SBATCH --partition=gpu" in ran.output
    assert "#SBATCH --time=8:00:00" in ran.output
    assert "# slurm.time = 8:00:00" in ran.output
    assert "# 2 ranks: 2 nodes with 1 rank each" in ran.output
    template = run("serve", *ECHO, *options, "--chat-template", "{{ a }}\nb").output
    assert "# model_conf.chat_template = {{ a }}\\nb" in template.splitlines()
    as_json = run("serve", *ECHO, *options, "--json").data
    assert as_json["script"].startswith("#!/bin/bash")
    assert as_json["config"]["model_conf"]["replica_num"] == 2
    assert calls(slurm) == []
    assert not home.exists()


def test_a_file_is_overruled_by_options_field_by_field_and_those_by_set(run, slurm, home, tmp_path):
    file = tmp_path / "chat.yaml"
    file.write_text(
        json.dumps(
            {
                "model_config": {"inference_engine_config": {"engine": "echo"}, "max_length": 100},
                "deployment_name": "chat",
                "cluster": "slurm",
                "slurm": {"partition": "cpu", "mem": "1G", "account": "physics"},
            }
        )
    )
    ran = run(
        *("serve", "-c", file, "--partition", "gpu", "--mem", "2G", "--set", "slurm.mem=3G"),
        *("--set", "replica_num=2", "--set", "model_conf.max_length=200", "--dry-run", "--json"),
    )
    slurm_fields, model = ran.data["config"]["slurm"], ran.data["config"]["model_conf"]
    assert (slurm_fields["partition"], slurm_fields["mem"], slurm_fields["account"]) == ("gpu", "3G", "physics")
    assert (model["replica_num"], model["max_length"]) == (2, 200)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serve",), "name a model folder"),
        (("serve", *ECHO, "--replica-num", "many"), "replica_num='many'"),
        (("serve", *ECHO, "--time", "soon"), "slurm.time='soon': must be minutes"),
        (("serve", *ECHO, "--set", "slurm.tim=1"), "unknown field 'slurm.tim': did you mean 'time'"),
        (("serve", *ECHO, "--set", "wait"), "must be NAME=VALUE"),
        (("serve", *ECHO, "--extra", "wait"), "--extra 'wait': must be NAME=VALUE"),
        (("serve", "-c", "/nowhere.yaml"), "not a readable YAML file"),
        (("serve", "/nowhere"), "no such folder"),
        (("serve", *ECHO, "--no-such-option"), "No such option"),
        (("generate", "chat", "x", "--temperature", "hot"), "temperature='hot'"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(run, slurm, home, arguments, said):
    ran = run(*arguments)
    assert ran.status == 2
    assert said in ran.errors
    assert ran.output == ""


def test_a_refused_job_is_status_4(run, slurm, home):
    slurm(sbatch="echo sbatch: error: invalid partition specified: gpu >&2; exit 1")
    ran = run("serve", *ECHO, "--cluster", "slurm", "--partition", "gpu", "--no-wait")
    assert ran.status == 4
    assert "invalid partition specified" in ran.errors


def test_without_waiting_it_says_which_job(run, slurm, home):
    ran = run("serve", *ECHO, "--cluster", "slurm", "--no-wait", "--json")
    assert ran.status == 0
    assert (ran.data["job_id"], ran.data["state"]) == ("4711", "pending")


def test_a_batch_script_prepares(run, slurm, home, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    ran = run("prepare", "--config", _echo_file(home.parent))
    assert ran.status == 0
    assert ran.output.strip().startswith(str(home / "runs" / "chat-"))
    assert run("ls", "--json").data[0]["job_id"] == "4712"


def test_no_job_follows_that_of_a_batch_script(run, slurm, home, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    file = _echo_file(home.parent)
    file.write_text(file.read_text().rstrip("}") + "}}, uptime: '7-0'}")
    ran = run("prepare", "--config", file)
    assert ran.status == 2
    assert "uptime='7-0': no job follows one that was submitted with a script of your own" in ran.errors


def _echo_file(folder):
    file = folder / "echo.yaml"
    file.write_text("{deployment_name: chat, model_config: {inference_engine_config: {engine: echo}}}")
    return file
