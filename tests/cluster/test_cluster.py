import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import submitit

from tests.waiting import PATIENCE, eventually, next_line

from .cluster import Cluster, ClusterError

pytestmark = pytest.mark.slurm

WORLD = """
import os
from mpi4py import MPI
world = MPI.COMM_WORLD
assert world.allgather(world.rank) == list(range(world.size))
# One write: the ranks share this pipe.
os.write(1, f"{world.rank} {world.size} {os.uname().nodename}\\n".encode())
"""

# A rank that has finished with MPI, as ours do, and writes down the signals that it and its children get.
RANK = """
import os, signal, subprocess, sys, time
from pathlib import Path

def log_signals(name):
    def log(number, frame):
        with Path(f"{name}.log").open("a") as out:
            print(signal.Signals(number).name, file=out)
    signal.signal(signal.SIGTERM, log)
    signal.signal(signal.SIGCONT, log)
    Path(f"{name}.pid").write_text(str(os.getpid()))

if len(sys.argv) > 1:
    log_signals(sys.argv[1])
else:
    from mpi4py import MPI
    name = f"rank{MPI.COMM_WORLD.rank}"
    MPI.COMM_WORLD.Barrier()
    MPI.Finalize()
    log_signals(name)
    # An orphan that holds the task's output would keep the job COMPLETING.
    child = [sys.executable, __file__, f"{name}-child"]
    subprocess.Popen(child, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
while True:
    time.sleep(0.1)
"""

SYSTEM_MPI = next(Path("/usr/lib").glob("*/libmpi.so.40"), None)
# The PyPI wheel's, if it is installed, and the system's.
MPIEXECS = [path for path in (Path(sys.executable).with_name("mpiexec"), Path("/usr/bin/mpiexec")) if path.exists()]


@pytest.fixture(autouse=True)
def clean(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.reset()


def run(*argv: str | Path, **env: str) -> str:
    done = subprocess.run(argv, env=os.environ | env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sbatch(folder: Path, command: str, *options: str) -> int:
    files = [f"--chdir={folder}", f"--output={folder}/%j.out"]
    return int(run("sbatch", "--parsable", *files, *options, f"--wrap={command}"))


def state(cluster: Cluster, job: int) -> str:
    return next(line.state for line in cluster.squeue() if line.id == job)


def test_four_nodes_are_idle(cluster: Cluster):
    text = run("sinfo", "--noheader", "--Node", "--partition=debug", "--format=%N %T")
    assert text.split("\n")[:-1] == ["n1 idle", "n2 idle", "n3 idle", "n4 idle"]


def test_nodes_are_hosts_of_their_own_that_know_each_other(cluster: Cluster):
    cluster.run_on("n1", ["touch", "/dev/shm/mine"], check=True)
    assert cluster.run_on("n1", ["ls", "/dev/shm"]).stdout == "mine\n"
    assert cluster.run_on("n2", ["ls", "/dev/shm"]).stdout == ""
    assert not Path("/dev/shm/mine").exists()
    assert cluster.run_on("n2", ["getent", "hosts", "n1"]).stdout.split() == [cluster.address("n1"), "n1"]


def test_a_second_cluster_is_refused(cluster: Cluster, tmp_path: Path):
    with pytest.raises(ClusterError, match=f"Process {os.getpid()} runs another test cluster"):
        Cluster(tmp_path).start()
    assert cluster.run_on("n1", ["hostname"]).stdout == "n1\n"


@pytest.mark.parametrize("library", ["the one mpi4py finds", "the system's"])
def test_srun_gives_mpi_one_world(cluster: Cluster, library: str):
    env = {}
    if library == "the system's":
        assert SYSTEM_MPI, "openmpi-bin brings libmpi.so.40"
        env["MPI4PY_LIBMPI"] = str(SYSTEM_MPI)
    text = run("srun", "--mpi=pmix", "--nodes=2", "--ntasks=4", sys.executable, "-c", WORLD, **env)
    rows = [line.split() for line in text.splitlines()]
    assert sorted(int(rank) for rank, _, _ in rows) == [0, 1, 2, 3]
    assert {size for _, size, _ in rows} == {"4"}
    assert len({host for _, _, host in rows}) == 2


def test_srun_without_pmix_gives_every_rank_a_world_of_its_own_or_none(cluster: Cluster):
    """The mistake a user makes: the size of the world is what tells."""
    argv = ["srun", "--mpi=none", "--nodes=2", "--ntasks=2", sys.executable, "-c", WORLD]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    sizes = {line.split()[1] for line in done.stdout.splitlines()}
    assert sizes == {"1"} if done.returncode == 0 else "SLURM's PMI support" in done.stderr


@pytest.mark.parametrize("mpiexec", MPIEXECS, ids=str)
def test_mpiexec_needs_no_slurm(mpiexec: Path):
    text = run(mpiexec, "--allow-run-as-root", "--oversubscribe", "-n", "4", sys.executable, "-c", WORLD)
    assert sorted(line.split()[:2] for line in text.splitlines()) == [[str(rank), "4"] for rank in range(4)]


def test_submitit_runs_a_job(cluster: Cluster, tmp_path: Path):
    executor = submitit.SlurmExecutor(folder=tmp_path)
    executor.update_parameters(nodes=2, ntasks_per_node=2, time=5, srun_args=["--mpi=pmix"])
    job = executor.submit(os.uname)
    eventually(lambda: state(cluster, int(job.job_id)) == "COMPLETED")
    assert Counter(host.nodename for host in job.results()) == {"n1": 2, "n2": 2}


def test_scancel_ends_a_job(cluster: Cluster, tmp_path: Path):
    job = sbatch(tmp_path, "srun sleep 600", "--partition=short")
    eventually(lambda: state(cluster, job) == "RUNNING")
    run("scancel", str(job))
    eventually(lambda: state(cluster, job) == "CANCELLED")


def test_gpus_can_be_asked_for(cluster: Cluster):
    text = run("srun", "--partition=gpu", "--nodes=1", "--gpus-per-node=2", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert text == "0,1\n"


@pytest.mark.parametrize(
    ("distribution", "per_node"),
    [
        ("--distribution=plane=4", {"n1": [0, 1, 2, 3], "n2": [4, 5]}),
        ("", {"n1": [0, 1, 2], "n2": [3, 4, 5]}),
    ],
    ids=["plane", "default"],
)
def test_only_plane_fills_a_node_before_the_next(
    cluster: Cluster, tmp_path: Path, distribution: str, per_node: dict[str, list[int]]
):
    """Six tasks in a job of two nodes with room for four each: by default srun evens them out."""
    command = f"srun --mpi=pmix {distribution} sh -c 'echo $SLURMD_NODENAME $SLURM_PROCID'"
    job = sbatch(tmp_path, command, "--nodes=2", "--ntasks-per-node=4", "--ntasks=6")
    eventually(lambda: state(cluster, job) == "COMPLETED")
    lines = (tmp_path / f"{job}.out").read_text().splitlines()
    rows = sorted(line.split() for line in lines if not line.startswith("srun:"))
    assert rows == [[node, str(rank)] for node, ranks in per_node.items() for rank in ranks]


def test_a_second_user_runs_commands_and_jobs(cluster: Cluster, second_user: str):
    assert cluster.run_on("n3", ["id", "-un"], user=second_user).stdout == f"{second_user}\n"
    done = cluster.run_on("n3", ["srun", "--nodes=1", "--ntasks=1", "id", "-un"], user=second_user)
    assert done.stdout == f"{second_user}\n", done.stderr
    eventually(lambda: cluster.squeue(f"--user={second_user}")[0].state == "COMPLETED")


def test_listening_sockets_and_processes_of_a_node(cluster: Cluster):
    assert [socket.port for socket in cluster.listening_sockets("n4")] == [6818]  # slurmd's
    server = cluster.popen_on("n4", [sys.executable, "-m", "http.server", "8000"], stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: len(cluster.listening_sockets("n4")) == 2)
        found = [socket for socket in cluster.listening_sockets("n4") if socket.port == 8000]
        assert [(socket.address, socket.pids) for socket in found] == [("0.0.0.0", (server.pid,))]
        assert cluster.job_processes("n4") == [server.pid]
    finally:
        server.kill()
        server.wait(PATIENCE)


def test_a_node_dies_and_comes_back(cluster: Cluster, tmp_path: Path):
    job = sbatch(tmp_path, "sleep 600", "--nodelist=n4", "--no-requeue")
    eventually(lambda: state(cluster, job) == "RUNNING")
    cluster.kill_node("n4")
    assert cluster.job_processes("n4") == []
    with pytest.raises(ClusterError, match="n4 is not a live node"):
        cluster.run_on("n4", ["true"])
    eventually(lambda: state(cluster, job) == "NODE_FAIL", seconds=90)
    cluster.revive_node("n4")
    assert run("srun", "--nodelist=n4", "hostname") == "n4\n"


def test_after_finalize_a_dead_rank_harms_no_other_and_scancel_reaches_all(cluster: Cluster, tmp_path: Path):
    """What the supervisors of our ranks build on."""

    def pids() -> dict[str, int]:
        return {path.stem: int(path.read_text() or 0) for path in tmp_path.glob("*.pid")}

    def living() -> set[str]:
        everywhere = {pid for node in cluster.nodes for pid in cluster.job_processes(node)}
        return {name for name, pid in pids().items() if pid in everywhere}

    (tmp_path / "rank.py").write_text(RANK)
    job = sbatch(tmp_path, f"srun --mpi=pmix {sys.executable} rank.py", "--nodes=2", "--ntasks-per-node=2")
    eventually(lambda: len(pids()) == 8 and all(pids().values()))

    os.kill(pids()["rank1"], signal.SIGKILL)
    time.sleep(2)  # nothing is to happen
    assert living() == set(pids()) - {"rank1"}

    run("scancel", str(job))
    eventually(lambda: state(cluster, job) == "CANCELLED")
    # A session of its own hides a child from no signal; a dead parent does, and the orphan is left for good.
    told = {path.stem for path in tmp_path.glob("*.log")}
    assert told == {"rank0", "rank0-child", "rank2", "rank2-child", "rank3", "rank3-child"}
    assert living() == {"rank1-child"}


def test_starting_clears_what_a_killed_run_left(cluster: Cluster):
    def namespaces() -> int:
        return len(list(Path("/run/netns").glob("mii-*")))

    cluster.stop()
    assert namespaces() == 0
    argv = [sys.executable, "-m", "tests.cluster"]
    root = Path(__file__).parents[2]
    try:
        # Munge wants a folder that all users can enter, which tmp_path is not.
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)
            env = os.environ | {"TMPDIR": folder}
            with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=root, env=env) as player:
                assert player.stdout
                assert b"n4, g1, g2, g3 are up" in next_line(player.stdout)
                player.kill()
            assert namespaces() == 1 + len(cluster.nodes)
    finally:
        cluster.start()
    assert len(cluster.listening_sockets("n1")) == 1
