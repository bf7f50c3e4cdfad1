"""Deployments on a real Slurm cluster, with real MPI ranks and real DeepSpeed engines."""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mii_hpc as mii
from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.clients.asynchronous import AsyncMIIClient
from mii_hpc.deployments import credentials
from mii_hpc.deployments.registry import Registry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.generation import joined
from mii_hpc.rpc import transport, wire
from mii_hpc.rpc.frames import RequestStream
from mii_hpc.schedulers import is_live
from tests.engine.reference import PROMPTS, Reference
from tests.models import tiny_model
from tests.planted import imported, plant
from tests.processes import command_line, open_files, program
from tests.waiting import PATIENCE, eventually

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
ECHO = {"inference_engine_config": {"engine": "echo", "echo_delay": 0.02}}
GREEDY = {"do_sample": False, "max_new_tokens": 24}

SERVE = """
import json, sys, mii_hpc as mii
mii.serve(**json.loads(sys.argv[1]))
"""
ASK = """
import json, sys, mii_hpc as mii
name, home, prompts, options = json.loads(sys.argv[1])
print(json.dumps([(str(a), a.replica) for a in mii.client(name, mii_config={"home": home})(prompts, **options)]))
"""


@pytest.fixture(scope="module")
def llama(shared):
    return tiny_model(shared / "tiny-llama", "llama", files=2)


@pytest.fixture(scope="module")
def gpt_neox(shared):
    return tiny_model(shared / "tiny-neox", "gpt_neox")


@pytest.fixture
def ended(cluster, home):
    """Ends, after the test, whatever jobs and entries it has left."""
    yield
    cluster.reset()
    shutil.rmtree(home / "registry", ignore_errors=True)


@pytest.fixture(scope="module")
def deployment(cluster, home, llama):
    """Two replicas of two ranks, served by a script that has exited."""
    arguments = {
        "model_name_or_path": str(llama),
        "tensor_parallel": 2,
        "replica_num": 2,
        "cluster": "slurm",
        "home": str(home),
        "startup_timeout": 400,
    }
    subprocess.run([sys.executable, "-c", SERVE, json.dumps(arguments)], check=True, timeout=500)
    yield mii.client("tiny-llama", mii_config={"home": home})
    cluster.reset()
    shutil.rmtree(home / "registry", ignore_errors=True)


def job_processes(cluster):
    return [pid for node in cluster.nodes for pid in cluster.job_processes(node)]


def ports(cluster):
    return {(node, socket.port) for node in cluster.nodes for socket in cluster.listening_sockets(node)}


def engines(cluster, run_dir):
    """The engine processes of a run, by rank in the replica and host."""
    ranks = RunDir(run_dir).load_config().model_conf.tensor_parallel
    found = {}
    for node in cluster.nodes:
        for pid in cluster.job_processes(node):
            words = command_line(pid)
            if "mii_hpc.job.engine_process" in words and str(run_dir) in words:
                output = Path(open_files(pid)[Path(f"/proc/{pid}/fd/1")])
                found[node, int(output.stem.removeprefix("engine-")) % ranks] = pid
    return found


def balancer(cluster, run_dir):
    """The balancer's process."""
    for node in cluster.nodes:
        for pid in cluster.job_processes(node):
            words = command_line(pid)
            if "mii_hpc.job.balancer" in words and str(run_dir) in words:
                return pid
    raise LookupError(run_dir)


def assert_ended(cluster, home, name, run_dir, ports_before):
    """Within 15 s: no process, no entry, no bound port."""
    eventually(lambda: not job_processes(cluster), PATIENCE, "every process of the job is gone")
    assert Registry(home).get(name) is None
    assert ports(cluster) == ports_before


def test_strict_round_robin(deployment):
    status = deployment.status()
    assert [(replica.index, replica.state) for replica in status.replicas] == [(0, "ready"), (1, "ready")]
    assert len({replica.host for replica in status.replicas}) == 2
    first = deployment("x", max_new_tokens=1)[0].replica
    turns = [(first + 1 + turn) % 2 for turn in range(8)]
    one_at_a_time = [deployment("x", max_new_tokens=1)[0].replica for _ in range(4)]
    in_one_list = [answer.replica for answer in deployment(["x"] * 4, max_new_tokens=1)]
    assert one_at_a_time + in_one_list == turns
    assert len(set(turns[:2])) == 2


def test_greedy_tokens_equal_transformers(deployment, llama):
    assert_greedy_like_transformers(deployment, llama)


def test_client_from_a_new_process_and_from_a_node_outside_the_job(cluster, deployment, home, llama):
    outside = next(node for node in cluster.nodes if not cluster.job_processes(node))
    expected = [str(answer) for answer in deployment(PROMPTS, **GREEDY)]
    for name in ("tiny-llama", str(llama)):
        argv = [sys.executable, "-c", ASK, json.dumps([name, str(home), PROMPTS, GREEDY])]
        here = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60)
        there = cluster.run_on(outside, argv, check=True, capture_output=True, text=True)
        for asked in (here, there):
            answers = json.loads(asked.stdout)
            assert [text for text, _ in answers] == expected
            assert {replica for _, replica in answers} == {0, 1}


def test_streams_dropped_half_way_leave_nothing_behind(deployment):
    def loads():
        """The load of each replica; none when one is too busy to tell it in time."""
        known = [replica.load for replica in deployment.status().replicas]
        return known if all(known) else []

    idle = eventually(loads)

    async def drop_half_way(client):
        stream = client.stream("x", max_new_tokens=200, ignore_eos=True)
        await anext(stream)
        await stream.aclose()

    async def drop_all():
        async with AsyncMIIClient(deployment.mii_config) as client:
            await asyncio.gather(*(drop_half_way(client) for _ in range(200)))

    asyncio.run(drop_all())
    at_rest = [(load.running, load.waiting, load.free_blocks) for load in idle]
    assert [blocks for *_, blocks in at_rest] == [load.total_blocks for load in idle]

    def in_hand():
        return [(load.running, load.waiting, load.free_blocks) for load in loads()]

    eventually(lambda: in_hand() == at_rest, PATIENCE, "no request runs and all blocks are free")


def test_poison_fails_alone(cluster, deployment, home):
    """Whatever the bytes, only their sender gets an error, and the engine processes stay the same ones."""
    entry = Registry(home).get("tiny-llama")
    before = engines(cluster, entry.run_dir)

    def request(prompt="x", **params):
        return pb.GenerateRequest(prompt=prompt, params=pb.GenerateParams(**params)).SerializeToString()

    poison = {
        "not a message": b"\xff\xff\xff\xff",
        "invalid UTF-8": b"\x12\x02\xc3\x28",
        "a megabyte": request("word " * 200_000),
        "longer than the cache": request("word " * 20_000),
        "ten thousand stop strings": request(stop=["s"] * 10_000),
        "temperature -1": request(temperature=-1),
        "temperature NaN": request(temperature=float("nan")),
        "negative length": request(max_new_tokens=-1),
    }
    harmless = {
        "empty prompt": request("", max_new_tokens=2),  # the tokenizer begins it with a token of its own
        "a number for a prompt": b"\x10\x05" + request(max_new_tokens=2),
        "unknown field": request(max_new_tokens=2) + b"\xaa\x3f\x04oops",
        "top_k beyond the vocabulary": request(top_k=2**31 - 1, max_new_tokens=2),
    }

    async def send(stream, payload):
        chunks = []
        try:
            with stream.request(payload, chunks.append, timeout=60) as ended:
                await ended
            return wire.unpack_response(b"".join(chunks)).finish_reason
        except mii.MIIError as error:
            return error

    async def send_all():
        keys = credentials.load_owner(RunDir(entry.run_dir))
        connection = transport.Connection(entry.address, keys)
        stream = RequestStream(connection.generate, transport.authorization(keys))
        try:
            return await asyncio.gather(*(send(stream, p) for p in (*poison.values(), *harmless.values())))
        finally:
            stream.close()
            await connection.channel.close()

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        running = [threads.submit(deployment, "x", max_new_tokens=200, ignore_eos=True) for _ in range(16)]

        def running_now():
            return sum(r.load.running for r in deployment.status().replicas if r.load)

        eventually(lambda: running_now() == 16, PATIENCE, "16 others run")
        outcomes = dict(zip([*poison, *harmless], asyncio.run(send_all()), strict=True))
        assert [future.result()[0].generated_length for future in running] == [200] * 16
    for name in poison:
        assert type(outcomes[name]) is mii.InvalidRequestError, (name, outcomes[name])
    assert {outcomes[name] for name in harmless} <= {"stop", "length"}
    assert engines(cluster, entry.run_dir) == before


def test_killed_engines_and_balancers_lose_no_request(cluster, deployment, home):
    """Every answer is token for token that of an undisturbed run, whoever asks and however."""
    entry = Registry(home).get("tiny-llama")
    # No end-of-sequence, so that all are still in flight when the engine dies.
    length = {"max_new_tokens": 200, "ignore_eos": True, "timeout": 240}
    ways = [{"do_sample": False}, {"seed": 3}, {"seed": 4, "num_return_sequences": 2}, {"seed": 5, "stop": "never"}]
    requests = [(prompt, {**way, **length}) for way in ways for prompt in PROMPTS[:4]]

    def ask(prompt, options):
        return deployment(prompt, **options)

    def stream(prompt, options):
        return joined(list(deployment.stream(prompt, **options)))

    def tokens(answers):
        return [(str(answer), answer.token_ids, answer.finish_reason) for answer in answers]

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        undisturbed = [threads.submit(ask, *request) for request in requests]
        expected = [tokens(future.result()) for future in undisturbed]
        asked = [threads.submit((ask, stream)[n % 2], *request) for n, request in enumerate(requests)]
        eventually(lambda: [r.in_flight for r in deployment.status().replicas] == [8, 8], PATIENCE, "8 on each replica")
        victim_host = deployment.status().replicas[0].host
        os.kill(engines(cluster, entry.run_dir)[victim_host, 0], signal.SIGKILL)
        eventually(lambda: deployment.status().replicas[0].migrations == 8, PATIENCE, "they go on elsewhere")
        os.kill(balancer(cluster, entry.run_dir), signal.SIGKILL)
        answers = [future.result() for future in asked]
    assert [tokens(each) for each in answers] == expected
    assert {each[0].migrations for each in answers} <= {1, 2}  # those of which nothing came in between know of one
    replica = eventually(
        lambda: next((r for r in deployment.status().replicas if r.index == 0 and r.state == "ready"), None),
        PATIENCE,
        "the replica serves again",
    )
    assert replica.epoch == 2
    assert Registry(home).get("tiny-llama").job_id == entry.job_id
    assert {answer.replica for answer in deployment(["x"] * 4, **GREEDY)} == {0, 1}


def test_terminate_leaves_nothing(cluster, deployment, home):
    entry = Registry(home).get("tiny-llama")
    deployment.terminate_server()
    assert_ended(cluster, home, "tiny-llama", entry.run_dir, {(node, 6818) for node in cluster.nodes})
    results = [pickle.loads(path.read_bytes()) for path in sorted(entry.run_dir.glob("submitit/*_result.pkl"))]
    assert results == [("success", None)] * 4
    eventually(lambda: _show(entry.job_id, "JobState") == "COMPLETED", PATIENCE, "Slurm says so, too")
    assert _show(entry.job_id, "ExitCode") == "0:0"


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_one_replica_over_two_nodes(cluster, home, request, architecture, ended):
    model = request.getfixturevalue(architecture)
    client = mii.serve(
        str(model), tensor_parallel=2, cluster="slurm", home=home, slurm={"tasks_per_node": 1}, startup_timeout=400
    )
    hosts = {node for node, _ in engines(cluster, Registry(home).get(model.name).run_dir)}
    assert len(hosts) == 2
    assert_greedy_like_transformers(client, model)


def test_second_architecture_then_scancel(cluster, home, gpt_neox, ended):
    before = ports(cluster)
    client = mii.serve(str(gpt_neox), tensor_parallel=2, cluster="slurm", home=home, startup_timeout=400)
    assert_greedy_like_transformers(client, gpt_neox)
    entry = Registry(home).get("tiny-neox")
    subprocess.run(["scancel", entry.job_id], check=True, timeout=PATIENCE)
    assert_ended(cluster, home, "tiny-neox", entry.run_dir, before)
    results = [pickle.loads(path.read_bytes()) for path in sorted(entry.run_dir.glob("submitit/*_result.pkl"))]
    assert results == [("success", None)] * 2
    eventually(lambda: _show(entry.job_id, "JobState") == "CANCELLED", PATIENCE, "Slurm says so, too")


def test_rank_that_cannot_load_fails_serve_at_once_with_its_traceback(cluster, shared, home, ended):
    broken = tiny_model(shared / "broken", "llama")
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]  # within a layer, only the job looks for what is missing
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(mii.DeploymentFailedError, match="Traceback") as caught:
        mii.serve(str(broken), cluster="slurm", home=home, startup_timeout=400)
    assert caught.value.job_id and "rank 0" in str(caught.value)
    assert "engine/model/loading.py" in caught.value.log  # the traceback is that of the rank that could not load
    assert Registry(home).get("broken") is None
    eventually(lambda: not job_processes(cluster), PATIENCE, "the job is gone")


def test_two_deployments_and_a_stale_entry(cluster, home, ended):
    first = mii.serve(deployment_name="first", cluster="slurm", home=home, **ECHO)
    second = mii.serve(deployment_name="second", cluster="slurm", home=home, **ECHO)
    assert str(first("one")[0]).strip() == "one" and str(second("two")[0]).strip() == "two"
    with pytest.raises(mii.DeploymentExistsError, match=r"deployment_name='first': taken by job \d+, which is ready"):
        mii.serve(deployment_name="first", cluster="slurm", home=home, **ECHO)
    with pytest.raises(mii.DeploymentNotFoundError, match="several"):
        mii.client("echo", mii_config={"home": home})
    ours = [pid for pid in job_processes(cluster) if program(pid) != "slurmstepd"]  # Slurm's own, which reports the end
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, for none is to tell of another's end
        for pid in ours:
            with contextlib.suppress(ProcessLookupError):  # it may end with another
                os.kill(pid, number)
    eventually(lambda: not job_processes(cluster), PATIENCE, "every process is gone")
    assert Registry(home).get("first").state == "ready"
    eventually(lambda: not is_live(Registry(home).get("first")), PATIENCE, "Slurm knows that the job is gone")
    with pytest.raises(mii.DeploymentNotFoundError, match="no longer runs"):
        mii.client("first", mii_config={"home": home})
    again = mii.serve(deployment_name="first", cluster="slurm", home=home, **ECHO)
    assert str(again("three")[0]).strip() == "three"
    again.terminate_server()


def test_dead_node_takes_only_its_replica(cluster, home, ended):
    client = mii.serve(replica_num=3, cluster="slurm", home=home, slurm={"tasks_per_node": 1}, **ECHO)
    job_id = client.status().job_id
    victim = client.status().replicas[2].host
    cluster.kill_node(victim)
    eventually(lambda: client.status().replicas[2].state != "ready", PATIENCE, "the replica is out")
    assert {answer.replica for answer in client(["x"] * 6)} == {0, 1}
    assert client.status().job_id == job_id
    lost = f"the job has lost node {victim}, and rank 2 with it"
    eventually(lambda: client.status().replicas[2].detail == lost, 2 * PATIENCE, "its node is not asked for again")
    client.terminate_server()


def test_walltime_ends_the_deployment_in_order(cluster, home, ended):
    client = mii.serve(cluster="slurm", home=home, slurm={"partition": "short", "time": "2"}, **ECHO)
    entry = Registry(home).get("echo")
    assert entry.ends is not None and 0 < entry.ends - time.time() <= 120
    eventually(lambda: Registry(home).get("echo") is None, 150, "it ends before its walltime")
    eventually(lambda: _show(entry.job_id, "JobState") == "COMPLETED", PATIENCE, "the ranks left with status 0")
    with pytest.raises((mii.DeploymentNotFoundError, mii.UnavailableError)):
        client("x")


def test_serve_inside_of_another_job(cluster, home, ended):
    """As from an interactive job: what Slurm has given that one does not shape the deployment's."""
    arguments = {"replica_num": 2, "cluster": "slurm", "home": str(home), **ECHO}
    outside = subprocess.run(
        ["srun", "--nodes=1", "--ntasks=1", "--mem=100M", sys.executable, "-c", SERVE, json.dumps(arguments)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert outside.returncode == 0, outside.stderr
    client = mii.client("echo", mii_config={"home": home})
    assert {answer.replica for answer in client(["x"] * 2)} == {0, 1}
    assert _show(client.status().job_id, "JobState") == "RUNNING", "its own job, which outlives the other"
    client.terminate_server()


@pytest.mark.parametrize(
    ("partition", "nodes", "gres"), [("gpu", "2", "gres:gpu:2"), ("typed", "1", "gres:gpu:a100:4")]
)
def test_an_unchanged_script_gets_gpus_where_there_are_some(
    cluster, home, llama, ended, monkeypatch, partition, nodes, gres
):
    """Four GPUs, on as many nodes as they take. torch can use none of them here, and the start says so."""
    if torch.cuda.is_available():
        pytest.skip("torch finds a GPU here, although the test cluster has none to give")
    monkeypatch.setenv("SBATCH_PARTITION", partition)
    with pytest.raises(mii.DeploymentFailedError) as caught:
        mii.serve(str(llama), tensor_parallel=2, replica_num=2, home=home)
    given = {"gpu": "2 GPU(s) on g[12]", "typed": "4 GPU(s) on g3"}[partition].replace("(s)", r"\(s\)")
    assert re.search(f"Slurm has given this job {given}, but torch finds none that it can use on g", str(caught.value))
    job_id = caught.value.job_id
    going_on = {"RUNNING", "COMPLETING"}  # as it ends, Slurm counts but the nodes that have not left it
    eventually(lambda: _show(job_id, "JobState") not in going_on, PATIENCE, "the job has ended")
    assert [_show(job_id, field) for field in ("NumNodes", "NumTasks", "TresPerNode")] == [nodes, "4", gres]
    assert Registry(home).get("tiny-llama") is None


def test_an_unchanged_script_gets_cpus_where_there_are_no_gpus(cluster, home, llama, ended, caplog):
    client = mii.serve(str(llama), tensor_parallel=2, replica_num=2, home=home, wait=False)
    entry = Registry(home).get("tiny-llama")
    assert "TresPerNode" not in _shown(entry.job_id)
    assert _show(entry.job_id, "NumNodes") in ("2", "2-2")
    assert "partitions that have some: 'gpu', 'typed'" in caplog.text
    assert client.mii_config.model_conf.device == "auto"


def test_what_sbatch_refuses(home, cluster):
    with pytest.raises(mii.SubmissionError, match=r"nvalid partition"):
        mii.serve(cluster="slurm", home=home, slurm={"partition": "nowhere"}, **ECHO)
    assert Registry(home).get("echo") is None


@pytest.mark.parametrize(
    ("template", "partition", "replicas"),
    [("one-node.sbatch", "gpu", 1), ("many-nodes.sbatch", "gpu", 2), ("cpu.sbatch", "debug", 2)],
)
def test_template_comes_up_and_answers(cluster, shared, home, llama, template, partition, replicas, ended):
    on_cpus = shared / "on-cpus.yaml"  # whatever GPUs the job has
    on_cpus.write_text("model_config: {device: cpu}")
    export = {"MODEL": llama, "CONFIG": on_cpus, "NAME": "by-hand", "PYTHON": sys.executable, "MII_HPC_HOME": home}
    variables = ",".join(f"{name}={value}" for name, value in export.items())
    options = ["--parsable", f"--partition={partition}", f"--export=ALL,{variables}"]
    folder = plant(shared / "working-directory")
    submitted = subprocess.run(
        ["sbatch", *options, REPOSITORY / "slurm" / template],
        check=True, capture_output=True, text=True, timeout=60, cwd=folder,
    )  # fmt: skip
    job_id = submitted.stdout.strip()

    def ready():
        assert _show(job_id, "JobState") in ("PENDING", "RUNNING"), (folder / f"mii-{job_id}.log").read_text()
        entry = Registry(home).get("by-hand")
        return entry is not None and entry.state == "ready"

    eventually(ready, 300, "the deployment is ready")
    client = mii.client(str(llama), mii_config={"home": home})
    assert len(client.status().replicas) == replicas
    assert_greedy_like_transformers(client, llama)
    client.terminate_server()
    eventually(lambda: _show(job_id, "JobState") == "COMPLETED", PATIENCE, "the batch script ended with status 0")
    assert imported(folder) == []


def assert_greedy_like_transformers(client, model):
    reference = Reference(model)
    expected = [reference.greedy(prompt, **GREEDY) for prompt in PROMPTS]
    answers = client(PROMPTS, **GREEDY)
    assert [list(answer.token_ids) for answer in answers] == expected
    assert [str(answer) for answer in answers] == [reference.decode(token_ids) for token_ids in expected]


def _show(job_id, field):
    return next(word.split("=", 1)[1] for word in _shown(job_id).split() if word.startswith(f"{field}="))


def _shown(job_id):
    argv = ["scontrol", "show", "job", job_id]
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout
