"""Jobs on this machine, with a script in the place of mpiexec."""

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mii_hpc.deployments import credentials
from mii_hpc.errors import SubmissionError
from mii_hpc.schedulers import JobState
from mii_hpc.schedulers import local as local_module
from mii_hpc.schedulers.local import LocalJob
from tests.submitting import submitted
from tests.waiting import PATIENCE, eventually

MPIEXEC = """#!/bin/sh
[ "$1" = --version ] && echo "mpiexec (OpenRTE) 4.1.4" && exit
"""


@pytest.fixture
def python(tmp_path, monkeypatch):
    """A Python that has no mpiexec beside it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return str(tmp_path / "bin" / "python")


@pytest.fixture
def local(echo_config, python, tmp_path):
    """Submit a deployment of two ranks; `mpiexec` is what stands in its place, found only by the setup lines."""
    folder = tmp_path / "module"
    folder.mkdir()
    started = []

    def submit(mpiexec, **fields):
        (folder / "mpiexec").write_text(MPIEXEC + mpiexec)
        (folder / "mpiexec").chmod(0o700)
        slurm = {"setup": [f"export PATH={folder}:$PATH", "export FROM_SETUP='two words'"], "python": python, **fields}
        run, entry = submitted(echo_config(cluster="local", replica_num=2, slurm=slurm))
        started.append(LocalJob(entry.job_id, entry.job_host, run.path))
        return run, started[-1]

    yield submit
    for job in started:
        job.cancel()
        ended(job)


def ended(job):
    eventually(lambda: job.state().phase == "gone", PATIENCE, "the job has ended")


def test_mpiexec_may_come_with_the_setup_lines(local, python):
    run, job = local('echo "$@"')
    ended(job)
    options, _, ranks = run.job_log.read_text().partition(" -n 2 ")
    assert options.startswith("--map-by :OVERSUBSCRIBE --bind-to none")
    assert ranks == f"{python} -P -m mii_hpc.job.rank {run.path}\n"


def test_without_an_mpiexec_it_says_what_to_do(local):
    run, job = local("", setup=["export PATH=/nowhere"])
    ended(job)
    assert "cluster='local' needs mpiexec, and there is none: pip install" in run.job_log.read_text()
    assert next(run.outputs()) == run.job_log


def test_a_python_that_cannot_be_started_is_refused(local):
    with pytest.raises(SubmissionError, match=r"^/no/such/python: cannot be started: No such file"):
        local("", python="/no/such/python", setup=[])


TELL = """
echo "MASK $(grep SigBlk /proc/$$/status | cut -f 2)"
for number in 0 1 2; do echo "FD$number $(readlink /proc/$$/fd/$number)"; done
env | sed "s/=/ /"
echo "complete yes"
read _ < "$FIFO"
"""


def test_the_job_is_apart_from_who_submits_it(local, monkeypatch, tmp_path):
    """Neither Ctrl-C nor a closed terminal nor what this process has around it reaches the job."""
    os.mkfifo(tmp_path / "fifo")
    around = {"FIFO": str(tmp_path / "fifo"), "CUDA_VISIBLE_DEVICES": "1,0", "SLURM_JOB_ID": "99", "PMIX_RANK": "3"}
    for name, value in around.items():
        monkeypatch.setenv(name, value)
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
    try:
        run, job = local(TELL)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR2})
    os.close(writing)
    eventually(lambda: "complete yes" in run.job_log.read_text(), PATIENCE, "the job has told of itself")
    assert select.select([reading], [], [], PATIENCE)[0] and os.read(reading, 1) == b"", "nobody holds our pipe open"
    os.close(reading)
    told = dict(line.split(" ", 1) for line in run.job_log.read_text().splitlines() if " " in line)
    assert os.getsid(int(job.id)) == int(job.id)
    assert (told["FD0"], told["FD1"], told["FD2"]) == (os.devnull, str(run.job_log), str(run.job_log))
    assert int(told["MASK"], 16) == 0
    assert (told["CUDA_VISIBLE_DEVICES"], told["FROM_SETUP"]) == ("1,0", "two words")
    assert told["MII_HPC_JOB_ID"] == job.id
    assert not {"SLURM_JOB_ID", "PMIX_RANK"} & told.keys()
    assert run.job_log.stat().st_mode & 0o777 == 0o600
    token = credentials.load_owner(run).token
    assert token not in Path(f"/proc/{job.id}/cmdline").read_text() + run.job_log.read_text()


HEEDING = """
exec "$PYTHON_OF_TEST" -c '
import os, signal, sys
def end(*_):
    os.write(1, b"told to end\\n")  # no print: another may be under way
    sys.exit()
signal.signal(signal.SIGUSR2, end)
os.write(1, b"up\\n")
signal.pause()'
"""


def test_cancelling_tells_the_ranks_by_the_signal_that_mpiexec_passes_on(local, monkeypatch):
    monkeypatch.setenv("PYTHON_OF_TEST", sys.executable)
    run, job = local(HEEDING)
    eventually(lambda: run.job_log.read_text() == "up\n", PATIENCE, "it runs")
    job.cancel()
    ended(job)
    assert run.job_log.read_text() == "up\ntold to end\n"
    eventually(lambda: not Path(f"/proc/{job.id}").exists(), PATIENCE, "no zombie is left of it")


def test_the_entry_names_process_and_host(local):
    _, job = local("")
    assert job.host == socket.gethostname()
    assert job.ends() is None


@pytest.fixture
def running(tmp_path):
    """A process like that of a local job, and the job that stands for it."""
    process = subprocess.Popen(["sh", "-c", "read _", "running", str(tmp_path)], stdin=subprocess.PIPE)
    yield process, LocalJob(str(process.pid), socket.gethostname(), tmp_path)
    process.kill()
    process.wait(PATIENCE)


def test_a_local_job_goes_by_its_process(running, tmp_path):
    process, job = running
    assert job.state().phase == "running"
    assert LocalJob(job.id, job.host, tmp_path / "other").state().phase == "gone", "its process id was used again"
    assert LocalJob(job.id, "elsewhere", tmp_path).state() == JobState("unknown", reason="it runs on elsewhere")
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert job.state().phase == "gone", "a zombie is dead"
    process.wait(PATIENCE)
    assert job.state().phase == "gone"


@pytest.fixture
def nameless(monkeypatch):
    """Have processes show so many empty command lines first, as while their program is being started."""
    real, left = Path.read_bytes, []

    def read(path):
        return left.pop() if left and path.name == "cmdline" else real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    return lambda times: left.extend([b""] * times)


def test_a_process_that_is_being_started_is_nobodys_until_it_tells(running, nameless, tmp_path):
    process, job = running
    for other in (LocalJob(job.id, job.host, tmp_path / "other"), job):
        nameless(2)
        assert other.state().phase == ("running" if other is job else "gone")
    nameless(2)
    LocalJob(job.id, job.host, tmp_path / "other").cancel()
    process.communicate(b"\n", timeout=PATIENCE)
    assert process.returncode == 0, "it has got no signal"


def test_what_never_tells_is_unknown_and_left_alone(running, nameless, monkeypatch):
    monkeypatch.setattr(local_module, "STARTING_SECONDS", 0.0)
    process, job = running
    nameless(1000)
    assert job.state().phase == "unknown"
    job.cancel()
    process.communicate(b"\n", timeout=PATIENCE)
    assert process.returncode == 0, "it has got no signal"


def test_cancelling_a_local_job(running, tmp_path):
    process, job = running
    LocalJob(job.id, job.host, tmp_path / "other").cancel()
    assert job.state().phase == "running", "somebody else's process is left alone"
    job.cancel()
    assert process.wait(PATIENCE) == -signal.SIGTERM
    job.cancel()
