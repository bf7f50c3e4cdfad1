"""Whole deployments on this machine: a script, the job, mpiexec, ranks, engines, balancer."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import mii_hpc
from mii_hpc.config import resolve
from mii_hpc.deployments.registry import Registry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.errors import DeploymentExistsError, DeploymentFailedError, UnavailableError
from mii_hpc.job.rank import is_served
from mii_hpc.schedulers import is_live, job_of
from mii_hpc.schedulers.local import JOB_ID
from mii_hpc.submission import submit as submission
from tests.planted import imported, plant
from tests.processes import command_line, open_files
from tests.waiting import PATIENCE, eventually

pytestmark = pytest.mark.mpi

SERVE = """
import sys, mii_hpc
client = mii_hpc.serve(
    deployment_name=sys.argv[1], home=sys.argv[2], cluster="local", tensor_parallel=2, replica_num=2,
    startup_timeout=120, inference_engine_config={"engine": "echo", "echo_delay": 0.01},
    slurm={"setup": ["export FROM_SETUP='two words'"]},
)
print(*(response.replica for response in client(["a", "b", "c", "d"])))
"""
"""A script that serves and exits."""


class Served:
    """A deployment that a script has left behind."""

    def __init__(self, name, home, started_by=()):
        self.name, self.home = name, home
        self.folder = plant(home.parent / "working-directory")
        command = [*started_by, sys.executable, "-P", "-c", SERVE, name, str(home)]
        script = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, cwd=self.folder)
        assert script.returncode == 0, script.stderr
        self.output = script.stdout
        self.entry = Registry(home).get(name)
        self.run = RunDir(self.entry.run_dir)

    def client(self):
        return mii_hpc.client(self.name, {"home": self.home})

    def processes(self, module=""):
        """Return the ids of its processes: all that have its run directory in their arguments."""
        lines = {int(path.name): command_line(path.name) for path in Path("/proc").glob("[0-9]*")}
        return [
            pid
            for pid, line in lines.items()
            if any(part.startswith(str(self.run.path)) for part in line)
            and (not module or line[1:4] == ["-P", "-m", f"mii_hpc.job.{module}"])
        ]

    def engine_of(self, rank):
        return next(
            pid
            for pid in self.processes("engine_process")
            if open_files(pid).get(Path(f"/proc/{pid}/fd/1")) == str(self.run.engine_log(rank))
        )

    def kill(self):
        pids = self.processes()
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, for none is to tell of another's end
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):  # its parent's death has ended it
                    os.kill(pid, number)
        eventually(lambda: not self.processes(), PATIENCE, "all killed")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("deployments") / "home"


@pytest.fixture(scope="module")
def served(home):
    served = Served("shared", home, started_by=["prlimit", "--nofile=512:4096"])
    yield served
    served.kill()


@pytest.fixture
def serve(home):
    made = []

    def start(name, **options):
        made.append(Served(name, home, **options))
        return made[-1]

    yield start
    for served in made:
        served.kill()


def test_it_goes_on_after_the_script_has_exited(served):
    assert served.output == "0 1 0 1\n"
    with served.client() as client:
        status = client.status()
        assert (status.state, [replica.state for replica in status.replicas]) == ("ready", ["ready", "ready"])
        assert [response.replica for response in client(["a", "b"])] == [0, 1]
    assert len(served.processes("rank")) == len(served.processes("engine_process")) == 4
    assert len(served.processes("balancer")) == 1


def test_every_process_may_open_as_many_files_as_the_user(served):
    for module in ("rank", "balancer", "engine_process"):
        for pid in served.processes(module):
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert re.search(r"Max open files +4096 +4096", limits), module


def test_modules_in_the_working_directory_are_not_imported(served):
    assert Path(f"/proc/{served.processes('engine_process')[0]}/cwd").readlink() == served.folder
    assert imported(served.folder) == []


def test_another_process_finds_it_by_name_and_by_model(served):
    script = (
        "import sys, mii_hpc\n"
        "for name in ('shared', 'echo'):\n"
        "    print(mii_hpc.client(name, {'home': sys.argv[1]})('hi'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(served.home)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.stdout == "[hi ]\n[hi ]\n", done.stderr


def test_nobody_connects_to_mpiexec(served):
    """It would run commands in its user's name for whoever says to be that user."""
    (mpiexec,) = psutil.Process(int(served.entry.job_id)).children()
    doors = [each.laddr for each in mpiexec.net_connections("tcp") if each.status == psutil.CONN_LISTEN]

    def is_open(door):
        try:
            socket.create_connection(door, 0.5).close()
        except TimeoutError:
            return False
        return True

    assert doors
    eventually(lambda: not any(map(is_open, doors)), PATIENCE, "it listens to nobody")


def test_setup_lines_run_before_the_ranks(served):
    environment = Path(f"/proc/{served.processes('rank')[0]}/environ").read_bytes().split(b"\0")
    assert b"FROM_SETUP=two words" in environment


def test_its_name_is_taken(served):
    with pytest.raises(DeploymentExistsError, match=r"^deployment_name='shared': taken by job \d+, which is ready"):
        mii_hpc.serve(
            deployment_name="shared", home=served.home, cluster="local", inference_engine_config={"engine": "echo"}
        )


def test_no_secret_is_in_arguments_environment_or_logs(served):
    run = served.run
    secrets = [file.read_bytes().strip() for file in (run.owner_token, run.guest_token, run.rank_token)]
    secrets.append(run.tls_key.read_bytes().splitlines()[1])
    places = [Path(f"/proc/{pid}/{name}") for pid in served.processes() for name in ("cmdline", "environ")]
    places += list(run.logs.iterdir())
    assert len(places) > 20 and run.job_log in places
    assert [place for place in places if any(secret in place.read_bytes() for secret in secrets)] == []


@pytest.mark.parametrize("rank", [2, 3], ids=["leader", "follower"])
def test_a_killed_engine_costs_no_request_and_comes_back(served, rank):
    with served.client() as client:
        others = {number: served.engine_of(number) for number in (0, 1)}
        victim = served.engine_of(rank)
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(client.generate, f"{number}", max_new_tokens=500) for number in range(8)]
            eventually(lambda: [r.in_flight for r in client.status().replicas] == [4, 4], PATIENCE, "all requests run")
            os.kill(victim, signal.SIGKILL)
            answers = [call.result()[0] for call in calls]
        assert [answer.generated_length for answer in answers] == [500] * 8
        assert sorted(answer.migrations for answer in answers) == [0] * 4 + [1] * 4
        eventually(lambda: client.status().replicas[1].state == "ready", PATIENCE, "the replica is back")
        assert sorted(response.replica for response in client(["a", "b"])) == [0, 1]
        assert {number: served.engine_of(number) for number in (0, 1)} == others
        assert client.status().job_id == served.entry.job_id


def test_a_killed_balancer_comes_back_at_its_address(served):
    with served.client() as client:
        engines = sorted(served.processes("engine_process"))
        epochs = [replica.epoch for replica in client.status().replicas]
        (balancer,) = served.processes("balancer")
        os.kill(balancer, signal.SIGKILL)

        def answers():
            try:
                return client("a")
            except UnavailableError:
                return None

        eventually(lambda: served.processes("balancer") not in ([], [balancer]), PATIENCE, "another balancer")
        eventually(answers, PATIENCE, "it serves again")
        eventually(lambda: client.status().state == "ready", PATIENCE, "it is ready again")
        assert sorted(served.processes("engine_process")) == engines
        assert [replica.epoch for replica in client.status().replicas] == epochs
        assert Registry(served.home).get("shared").address == served.entry.address


def test_termination_leaves_nothing_behind(serve):
    served = serve("ends")
    assert served.processes()
    served.client().terminate_server()
    assert Registry(served.home).get("ends") is None
    eventually(lambda: not served.processes(), PATIENCE, "no process is left")
    eventually(lambda: not is_live(served.entry), PATIENCE, "its job has ended")
    host, _, port = served.entry.address.rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))
    assert not list(served.run.failures.iterdir())
    assert [path.name for path in served.run.outputs() if "Traceback" in path.read_text()] == []


def test_cancelling_the_job_ends_it_in_order_whatever_signals_were_ignored(serve):
    served = serve("cancelled", started_by=["sh", "-c", "trap '' INT TERM USR2 CHLD CONT HUP; exec \"$@\"", "sh"])
    job_of(served.entry).cancel()
    eventually(lambda: not served.processes(), PATIENCE, "no process is left")
    assert Registry(served.home).get("cancelled") is None
    assert not list(served.run.failures.iterdir())


def test_what_was_killed_hard_does_not_block_its_name(serve):
    killed = serve("killed")
    killed.kill()
    assert Registry(killed.home).get("killed").state == "ready"
    eventually(lambda: not is_live(Registry(killed.home).get("killed")), PATIENCE, "its job is known to be gone")
    with pytest.raises(mii_hpc.DeploymentNotFoundError, match="no longer runs"):
        killed.client()
    again = serve("killed")
    assert again.entry.run_dir != killed.entry.run_dir
    with again.client() as client:
        client("x")
        client.terminate_server()


def test_ranks_that_fail_are_told_of_at_once(home, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'mii_hpc.job.engine_process' in sys.orig_argv:\n"
        "    raise SystemExit('this cluster has no such library')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DeploymentFailedError, match="this cluster has no such library") as failure:
        mii_hpc.serve(
            deployment_name="broken",
            home=home,
            cluster="local",
            startup_timeout=2 * PATIENCE,
            inference_engine_config={"engine": "echo"},
        )
    assert "rank 0 (replica 0, host" in str(failure.value)
    eventually(lambda: Registry(home).get("broken") is None, PATIENCE, "the name is free")


def test_deployments_leave_nothing_but_their_run_directories():
    """In a process of its own, for others' threads and files come and go in this one."""
    cycles = subprocess.run(
        [sys.executable, "-m", "benchmarks.cycles", "2"], capture_output=True, text=True, timeout=3 * PATIENCE
    )
    assert cycles.returncode == 0, cycles.stdout + cycles.stderr


def test_a_rank_that_fails_before_there_is_a_balancer_frees_the_name(tmp_path):
    config = resolve(
        deployment_name="early", inference_engine_config={"engine": "echo"}, home=tmp_path, cluster="local"
    )
    run, _ = submission.prepare(config)
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", JOB_ID)}
    command = [sys.executable, "-m", "mii_hpc.job.rank", str(run.path)]
    assert subprocess.run(command, env=environment, capture_output=True, timeout=PATIENCE).returncode == 1
    assert JOB_ID in run.read_failure().message
    assert Registry(tmp_path).get("early") is None


def test_the_balancers_heartbeat_tells_whether_it_serves_others(tmp_path):
    config = resolve(
        deployment_name="beats", inference_engine_config={"engine": "echo"}, home=tmp_path, cluster="local"
    )
    run, entry = submission.prepare(config)
    assert not is_served(run, config)
    registry, serving = Registry(tmp_path), entry.model_copy(update={"address": "10.0.0.1:1"})
    registry.publish(serving)
    assert is_served(run, config)
    assert not is_served(RunDir(tmp_path / "runs" / "another"), config)
    registry.publish(serving.model_copy(update={"heartbeat": entry.heartbeat - 60}))
    assert not is_served(run, config)
