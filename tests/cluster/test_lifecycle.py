"""The end of parts of a deployment, and of the whole, on a real Slurm cluster; with engines that need no torch."""

import os
import signal
import subprocess

import pytest

import mii_hpc as mii
from mii_hpc.deployments.registry import Registry
from mii_hpc.deployments.rundir import RunDir
from tests.processes import command_line
from tests.waiting import PATIENCE, eventually

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

ECHO = {"inference_engine_config": {"engine": "echo", "echo_delay": 0.02}, "cluster": "slurm"}


@pytest.fixture
def ended(cluster):
    yield
    cluster.reset()


@pytest.fixture
def serve(cluster, home, ended):
    """Serve replicas, each on a node of its own."""

    def submit(name, replica_num=2, options=None, **slurm):
        given = {"home": home, "slurm": {"tasks_per_node": 1, **slurm}, "startup_timeout": 120, **ECHO}
        return mii.serve(deployment_name=name, replica_num=replica_num, **given, **(options or {}))

    return submit


def state_of(home, name):
    entry = Registry(home).get(name)
    return entry and entry.state


def slurm_states(cluster, job_id):
    """What Slurm says of a job, in a list: it may have forgotten it."""
    return [job.state for job in cluster.squeue() if str(job.id) == job_id]


def processes(cluster):
    return [pid for node in cluster.nodes for pid in cluster.job_processes(node)]


def supervisor(cluster, node):
    for pid in cluster.job_processes(node):
        words = command_line(pid)
        if words and "srun" not in words[0] and {"submitit.core._submit", "mii_hpc.job.rank"} & set(words):
            return pid
    raise LookupError(node)


def answered(client, replicas):
    """Whether all these replicas answer."""
    try:
        return {answer.replica for answer in client(["x"] * 6, timeout=PATIENCE)} == replicas
    except mii.MIIError:
        return False


def test_lost_supervisors_are_replaced_in_the_same_job(cluster, home, serve):
    client = serve("replaced", 3)
    entry = Registry(home).get("replaced")
    hosts = [replica.host for replica in client.status().replicas]
    os.kill(supervisor(cluster, hosts[1]), signal.SIGKILL)
    eventually(lambda: state_of(home, "replaced") == "degraded", PATIENCE, "a replica is out")
    eventually(lambda: state_of(home, "replaced") == "ready", PATIENCE, "it is back")
    eventually(lambda: answered(client, {0, 1, 2}), PATIENCE, "all replicas answer")
    os.kill(supervisor(cluster, hosts[0]), signal.SIGKILL)
    eventually(lambda: answered(client, {0, 1, 2}), PATIENCE, "the others have started rank 0 again")
    assert Registry(home).get("replaced").job_id == entry.job_id
    client.terminate_server()
    eventually(lambda: not processes(cluster), PATIENCE, "every process is gone")


@pytest.mark.parametrize("options", [["--signal=INT"], ["--signal=USR1"], ["--batch", "--signal=USR2"]], ids=" ".join)
def test_whatever_signal_scancel_sends_ends_it_in_order(cluster, home, serve, options):
    serve("signalled")
    entry = Registry(home).get("signalled")
    subprocess.run(["scancel", *options, entry.job_id], check=True, timeout=PATIENCE)
    eventually(lambda: Registry(home).get("signalled") is None, PATIENCE, "the name is free")
    eventually(lambda: not processes(cluster), PATIENCE, "every process is gone")
    assert not list((entry.run_dir / "failures").iterdir())


def test_a_suspended_job_loses_nothing(cluster, home, serve):
    client = serve("suspended")
    job_id = Registry(home).get("suspended").job_id
    words = [f"word{number}" for number in range(300)]
    pieces = client.stream(" ".join(words), timeout=PATIENCE)
    text = next(pieces).generated_text
    subprocess.run(["scontrol", "suspend", job_id], check=True, timeout=PATIENCE)
    eventually(lambda: slurm_states(cluster, job_id) == ["SUSPENDED"], PATIENCE, "it is suspended")
    subprocess.run(["scontrol", "resume", job_id], check=True, timeout=PATIENCE)
    text += "".join(piece.generated_text for piece in pieces)
    assert text.split() == words
    eventually(lambda: state_of(home, "suspended") == "ready", PATIENCE, "it serves")
    assert (Registry(home).get("suspended").job_id, answered(client, {0, 1})) == (job_id, True)


def test_a_requeued_job_is_found_again(cluster, home, serve):
    """By hand, and by a job of a partition that preempts its own."""
    client = serve("requeued", partition="low")
    job_id = Registry(home).get("requeued").job_id
    preempt = ["sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true"]
    for incarnation, requeue in enumerate((["scontrol", "requeue", job_id], preempt), 1):
        subprocess.run(requeue, check=True, timeout=PATIENCE)
        eventually(lambda: slurm_states(cluster, job_id) == ["PENDING"], PATIENCE, "it waits in the queue")
        assert state_of(home, "requeued") == "pending"
        with pytest.raises(mii.UnavailableError, match="is not serving yet: its job"):
            mii.client("requeued", mii_config={"home": home})("x")
        eventually(lambda: state_of(home, "requeued") == "ready", 2 * PATIENCE, "it serves again")
        eventually(lambda: answered(client, {0, 1}), PATIENCE, "the client finds it")
        assert Registry(home).get("requeued").incarnation == incarnation
    client.terminate_server()
    eventually(lambda: not processes(cluster), PATIENCE, "every process is gone")


def test_the_next_job_takes_the_name_before_the_walltime_is_over(cluster, home, serve):
    """It is to be ready so long before that it is submitted, and starts, at once."""
    client = serve("relieved", options={"uptime": "10:05", "handover": 590}, time="10")
    first = Registry(home).get("relieved")
    stream = client.stream("a", max_new_tokens=1500)
    pieces, owners = [next(stream)], []
    while len(set(owners)) < 2:
        owners.append(Registry(home).get("relieved").job_id)
        assert [str(answer) for answer in client(["x"] * 4, timeout=PATIENCE)] == ["x "] * 4
    pieces += list(stream)
    assert "".join(map(str, pieces)) == "a " * 1500
    assert owners[0] == first.job_id
    status = client.status()
    assert (status.state, status.until) == ("ready", first.until)
    assert RunDir(first.run_dir).read_failure() is None
    client.terminate_server()
    eventually(lambda: not processes(cluster), PATIENCE, "every process of every job is gone")
    assert Registry(home).get("relieved") is None

    def states():
        return {job.state for job in cluster.squeue() if job.name == "mii-relieved"}

    eventually(lambda: states() <= {"COMPLETED", "CANCELLED"}, PATIENCE, "Slurm knows of no job that goes on")


def test_the_last_survivor_ends_the_job(cluster, home, serve):
    """Rank 0's node, and with it the batch script, dies without a word."""
    client = serve("cut")
    entry = Registry(home).get("cut")
    cluster.kill_node(client.status().replicas[0].host)
    with pytest.raises(mii.UnavailableError):
        client("x", timeout=2 * PATIENCE)
    eventually(lambda: Registry(home).get("cut") is None, 2 * PATIENCE, "the name is free")
    eventually(lambda: slurm_states(cluster, entry.job_id) != ["RUNNING"], PATIENCE, "the job has ended")


def test_a_setup_line_that_fails_is_named(home, ended):
    with pytest.raises(mii.DeploymentFailedError, match=r"slurm.setup: 'ls /nonexistent' ended with status 2"):
        mii.serve(deployment_name="setup", home=home, slurm={"setup": ["ls /nonexistent"]}, **ECHO)
    assert Registry(home).get("setup") is None
