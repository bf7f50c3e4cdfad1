import subprocess
import sys
from pathlib import Path

import pytest

from mii_hpc.cli.output import duration
from mii_hpc.deployments.rundir import Failure, RunDir
from tests.waiting import eventually


def test_ls_lists_what_runs_and_what_is_gone(run, chat):
    assert "chat" in run("ls").output
    (entry,) = run("ls", "--json").data
    assert (entry["deployment_name"], entry["state"]) == ("chat", "ready")
    chat.deployment.end_job()
    assert run("ls", "--json").data[0]["state"] == "ended"


def test_ls_of_nothing_has_its_headings(run, tmp_path):
    assert run("ls", "--home", tmp_path).output.split() == [
        "NAME",
        "MODEL",
        "STATE",
        "JOB",
        "HOST",
        "DETAIL",
        "AGE",
        "LEFT",
    ]
    assert run("ls", "--home", tmp_path, "--json").data == []


def test_status_tells_of_every_replica(run, chat):
    text = run("status", "chat").output
    assert "chat: ready" in text
    assert len([line for line in text.splitlines() if " ready " in line]) == 2
    assert [replica["state"] for replica in run("status", "chat", "--json").data["replicas"]] == ["ready", "ready"]


@pytest.mark.parametrize("command", ["status", "wait", "logs", "stop", "env"])
def test_what_is_not_there_is_status_3(run, tmp_path, command):
    ran = run(command, "nothing", "--home", tmp_path)
    assert ran.status == 3
    assert "nothing" in ran.errors
    assert ran.output == ""


def test_wait_returns_once_it_is_ready(run, chat):
    assert run("wait", "chat", "--json").data["state"] == "ready"


def test_wait_tells_of_a_failure(run, slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("MII_HPC_HOME", str(tmp_path / "home"))
    served = run("serve", "--engine", "echo", "--name", "ill", "--cluster", "slurm", "--no-wait", "--json").data
    RunDir(Path(served["run_dir"])).write_failure(Failure(0, "node0", "the model has no weights", "Traceback"))
    ran = run("wait", "ill")
    assert ran.status == 4
    assert "has ended before it was ready: the model has no weights\nTraceback" in ran.errors


def test_wait_gives_up_after_its_timeout(run, slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("MII_HPC_HOME", str(tmp_path / "home"))
    slurm(squeue="echo 'PENDING|Priority'")
    run("serve", "--engine", "echo", "--name", "late", "--cluster", "slurm", "--no-wait")
    ran = run("wait", "late", "--timeout", "0")
    assert ran.status == 4
    assert "'late' is pending after --timeout 0 s" in ran.errors


def test_logs_of_all_and_of_one_rank(run, chat):
    logs = chat.deployment.run.logs
    (logs / "rank-0.log").write_text("zero\n")
    (logs / "rank-1.log").write_text("".join(f"line {number}\n" for number in range(100)))
    assert "==> logs/rank-0.log <==\nzero" in run("logs", "chat").output
    assert run("logs", "chat", "--rank", 1, "-n", 2).output == "==> logs/rank-1.log <==\nline 98\nline 99\n"
    assert '{"file": "logs/rank-0.log", "line": "zero"}' in run("logs", "chat", "--json").output
    refused = run("logs", "chat", "--rank", 2)
    assert (refused.status, "ranks 0 to 1" in refused.errors) == (2, True)


def test_logs_of_a_deployment_that_has_ended(run, chat):
    (chat.deployment.run.logs / "rank-0.log").write_text("last words\n")
    assert run("stop", "chat").output == "deployment 'chat' has ended\n"
    assert "last words" in run("logs", "chat").output
    assert "last words" in run("logs", "chat", "--follow").output


def test_logs_are_followed_until_the_end(run, chat):
    log = chat.deployment.run.logs / "rank-0.log"
    log.write_text("first\n")
    command = [sys.executable, "-m", "mii_hpc", "logs", "chat", "--follow", "--rank", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout.readline() == "==> logs/rank-0.log <==\n"
        assert following.stdout.readline() == "first\n"
        with log.open("a") as file:
            file.write("second\n")
        assert following.stdout.readline() == "second\n"
        chat.do(chat.deployment.stop())
        assert eventually(lambda: following.poll() is not None)
    assert following.returncode == 0


def test_env_sets_what_the_openai_client_reads(run, chat):
    token = chat.deployment.run.owner_token.read_text().strip()
    assert run("env", "chat").output == (
        f"export OPENAI_BASE_URL=http://127.0.0.1:8000/v1\nexport OPENAI_API_KEY={token}\n"
    )


def test_env_of_a_deployment_with_a_gateway_trusts_its_certificate(run, chat):
    deployment = chat.deployment
    deployment.run.gateway_url.write_text("https://node0:4433")
    eventually(lambda: deployment.registry.get("chat").gateway)
    variables = run("env", "chat", "--json").data
    assert variables["OPENAI_BASE_URL"] == "https://node0:4433/v1"
    assert Path(variables["SSL_CERT_FILE"]) == deployment.run.tls_certificate


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (-1, "0s"), (59.4, "59s"), (61, "1m01s"), (7500, "2h05m"), (90000, "1d01h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
