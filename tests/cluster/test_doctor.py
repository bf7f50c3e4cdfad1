"""`mii-hpc doctor --on-nodes` on a real cluster, where each fault is made on purpose."""

import json
import shutil
import tempfile

import pytest
from typer.testing import CliRunner

from mii_hpc.cli import doctor
from mii_hpc.cli.main import app

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture
def examine(cluster, home, monkeypatch):
    """What is found by a job alone: the status, and the findings by host and check."""
    monkeypatch.setattr(doctor, "check_all", lambda home, mpi: ())
    monkeypatch.setattr(doctor, "POLL_SECONDS", 0.1)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # which would be a fault where the cache is empty

    def examine(home, *options):
        ran = CliRunner().invoke(app, ["doctor", "--on-nodes", "--json", "--home", str(home), *options])
        assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
        found = json.loads(ran.stdout)
        assert ran.exit_code == (4 if any(each["state"] == "bad" for each in found) else 0)
        return {(each["host"], each["check"]): each for each in found}

    yield examine
    cluster.reset()


def test_ranks_on_two_nodes_meet_and_report(examine, cluster, home):
    found = examine(home)
    assert found["", "meeting"]["state"] == "good"
    assert "the 2 ranks have met" in found["", "meeting"]["found"]
    hosts = {host for host, _ in found} - {""}
    assert len(hosts) == 2
    for host in hosts:
        assert cluster.address(host) in found[host, "address"]["found"]
        assert found[host, "home"]["state"] == found[host, "hard links"]["state"] == "good"
        assert {check for there, check in found if there == host} >= {"home", "clock", "MPI", "torch", "open files"}
    assert list((home / "runs").glob("doctor-*")) == []


def test_an_mpi_plugin_that_does_not_fit(examine, home):
    found = examine(home, "--mpi", "none", "--nodes", "1")
    (meeting,) = [each for (_, check), each in found.items() if check == "meeting"]
    assert meeting["found"].startswith("MPI sees a world of 1 rank where 2 were started")
    assert "--mpi" in meeting["remedy"]


def test_a_home_that_the_nodes_do_not_see(examine, own_memory):
    assert "no report from 2 ranks" in examine(own_memory)["", "job"]["found"]


@pytest.fixture
def own_memory(tmp_path):
    """A home that only this machine sees: each node has a /dev/shm of its own."""
    folder = tempfile.mkdtemp(prefix="mii-doctor-", dir="/dev/shm")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("options", "said", "remedy"),
    [
        (("--python", "/nowhere/python"), "/nowhere/python: No such file", "--python"),
        (("--setup", "module load nothing"), "slurm.setup: 'module load nothing' ended with status", "--setup"),
        (("--partition", "nowhere"), "invalid partition specified: nowhere", "--partition"),
        (("--nodes", "20", "--timeout", "0"), "waits after 0 s", "--nodes"),
    ],
)
def test_a_job_that_does_not_run(examine, home, options, said, remedy):
    (job,) = examine(home, *options).values()
    assert said in job["found"]
    assert remedy in job["remedy"]
