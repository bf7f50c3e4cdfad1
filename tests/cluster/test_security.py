"""Closed to everyone else on the cluster, open to those who are named: shown by a real second Unix user."""

import collections
import concurrent.futures
import contextlib
import grp
import json
import os
import pwd
import re
import select
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import mii_hpc as mii
from mii_hpc.clients import asynchronous as clients
from mii_hpc.config import MIIConfig
from mii_hpc.deployments import credentials
from mii_hpc.deployments.lookup import SharedHome
from mii_hpc.deployments.registry import Entry, Registry
from mii_hpc.deployments.rundir import RunDir
from tests.models import tiny_model
from tests.planted import imported
from tests.processes import command_line, open_files, program
from tests.waiting import PATIENCE, eventually

from .cluster import Cluster
from .stranger import METHODS, TOKENS
from .test_deployment import job_processes

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

STRANGER = [sys.executable, "-m", "tests.cluster.stranger"]
REPOSITORY = Path(__file__).parents[2]
GROUP, MEMBER = "mii-lab", "mii-member"
ECHO = {"inference_engine_config": {"engine": "echo", "echo_delay": 0.02}}
PROMPT = "a-prompt-that-nobody-else-shall-read and its-answer"
SLURM = ("slurmd", "slurmstepd", "srun")


@pytest.fixture(scope="module")
def group_member(cluster):
    """An ordinary user who is in the group that deployments are shared with."""
    subprocess.run(["groupadd", "--force", GROUP], check=True, timeout=PATIENCE)
    try:
        pwd.getpwnam(MEMBER)
    except KeyError:
        subprocess.run(["useradd", "--create-home", "--groups", GROUP, MEMBER], check=True, timeout=PATIENCE)
    assert MEMBER in grp.getgrnam(GROUP).gr_mem
    yield MEMBER
    subprocess.run(["userdel", "--remove", "--force", MEMBER], check=True, capture_output=True, timeout=PATIENCE)
    subprocess.run(["groupdel", GROUP], check=True, capture_output=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def sharded(cluster, shared, home):
    """Two replicas of two ranks with real engines, each on a node of its own."""
    model = tiny_model(shared / "secret-llama")
    client = mii.serve(str(model), tensor_parallel=2, replica_num=2, cluster="slurm", home=home, startup_timeout=400)
    yield client
    client.terminate_server()


@pytest.fixture
def echo(cluster, home, group_member):
    """A deployment of two replicas on two nodes, shared with the group."""
    client = mii.serve(replica_num=2, cluster="slurm", home=home, share=f"group:{GROUP}", **ECHO)
    yield client
    with contextlib.suppress(mii.DeploymentNotFoundError):
        client.terminate_server()


def run_dir_of(client):
    return RunDir(Registry(client.mii_config.home).get(client.mii_config.deployment_name).run_dir)


def ports_of_the_job(cluster):
    """Every listening socket of the job's processes, from the kernel, with the address to knock at."""
    found = {}
    for node in cluster.nodes:
        for listening in cluster.listening_sockets(node):
            names = {program(pid) for pid in listening.pids}
            if not names & set(SLURM):
                address = listening.address.removeprefix("::ffff:")
                address = cluster.address(node) if address in ("0.0.0.0", "*", "::") else address
                found.setdefault(node, {})[f"{address}:{listening.port}"] = listening
    return found


def processes_of(cluster, run, *modules):
    """The processes whose command lines name a run's directory, and these modules."""
    words = {pid: command_line(pid) for pid in job_processes(cluster)}
    return [pid for pid, given in words.items() if str(run.path) in " ".join(given) and set(modules) <= set(given)]


def stranger(cluster, node, user, task):
    done = cluster.run_on(
        node, [*STRANGER, user, "knock", json.dumps(task)], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_second_user_gets_nowhere(cluster, second_user, sharded, home):
    run = run_dir_of(sharded)
    entry = Registry(home).folder / "secret-llama.json"
    forbidden = [
        home / "runs",
        run.path,
        run.config,
        run.owner_token,
        run.tls_key,
        run.logs,
        Registry(home).folder,
        entry,
    ]
    ports = ports_of_the_job(cluster)
    assert sum(len(found) for found in ports.values()) >= 5  # balancer, two replicas, a store each
    refused = collections.Counter()
    for node, found in ports.items():
        task = {"knock": list(found), "read": list(map(str, forbidden)), "replace": [str(entry)]}
        result = stranger(cluster, node, second_user, task)
        assert result["uid"] == pwd.getpwnam(second_user).pw_uid
        assert set(result["read"].values()) == {"PermissionError"}
        assert set(result["replaced"].values()) == {"PermissionError"}
        for address, way, token, method, status in result["calls"]:
            assert status not in ("OK", "ANSWERED"), (address, way, token, method)
            refused[address, way, status] += 1
    # It was the certificate that was missing at the three doors behind which somebody answers, and TLS in the clear.
    doors = {address for address, way, _ in refused if way == "tls"}
    assert len(doors) == 3, refused
    for address in doors:
        outcomes = {(way, status): count for (door, way, status), count in refused.items() if door == address}
        assert outcomes == {
            ("tls", "UNAVAILABLE"): len(TOKENS) * len(METHODS),
            ("own", "UNAVAILABLE"): len(TOKENS) * len(METHODS),
            ("plain", "UNAVAILABLE"): len(TOKENS),
        }
    assert str(sharded(PROMPT, max_new_tokens=1)[0]) is not None


def test_the_ranks_of_a_replica_meet_where_nobody_else_can(cluster, second_user, sharded):
    """Their store is a file in memory, to which there is no way but through the processes that have it."""
    engines = processes_of(cluster, run_dir_of(sharded), "mii_hpc.job.engine_process")
    stores = {
        str(descriptor): descriptor.stat()
        for pid in engines
        for descriptor, leads_to in open_files(pid).items()
        if leads_to.startswith("/memfd:store")
    }
    assert len(engines) == 4 and len(stores) == 2, "each leader has one"
    assert {(status.st_mode & 0o777, status.st_uid) for status in stores.values()} == {(0o600, os.geteuid())}
    assert all(status.st_size for status in stores.values()), "the ranks have met there"
    node = sharded.status().host
    assert set(stranger(cluster, node, second_user, {"knock": [], "read": list(stores)})["read"].values()) == {
        "PermissionError"
    }


def test_ports_of_a_replica_on_one_host_are_on_loopback(cluster, sharded):
    for node, found in ports_of_the_job(cluster).items():
        own = [address for address in found if not address.startswith("127.0.0.1:")]
        # To other hosts there are the balancer's and the leader's door, and nothing of torch.distributed's.
        assert len(own) == (2 if node == sharded.status().host else 1)
        assert len(found) > len(own)


def test_planted_home_is_not_believed(cluster, shared, second_user, home):
    planted = shared / "planted"
    shutil.copytree(home / "registry", planted / "registry")
    for path in (planted, *planted.rglob("*")):
        shutil.chown(path, second_user)
    with pytest.raises(mii.RegistryError, match="belongs to user id"):
        mii.client("secret-llama", mii_config={"home": planted})


def test_traffic_shows_neither_prompt_nor_answer_nor_token(cluster, echo, home):
    token = credentials.read_token(run_dir_of(echo).owner_token)
    answers = []
    with Capture(bridge_of(cluster)) as capture:
        # Four prompts, so that both replicas serve: the balancer's own node and another one.
        answers = echo([PROMPT] * 4, return_full_text=True)
    seen = capture.bytes
    assert {answer.replica for answer in answers} == {0, 1}
    assert len(seen) > 5_000  # what crossed between login side, balancer and the other node
    for secret in (PROMPT, *PROMPT.split(), token, str(answers[0])):
        assert secret.encode() not in seen


def test_secrets_are_in_no_file_but_theirs_and_in_no_process(cluster, echo, home, shared):
    run = run_dir_of(echo)
    echo(PROMPT)
    with pytest.raises(mii.InvalidRequestError):
        echo("too long", max_length=1)
    own = {run.owner_token, run.rank_token, run.guest_token, run.tls_key, run.owner_identity, run.guest_identity}
    own |= {home / "shared" / "echo" / name for name in ("token", "client.pem")}
    secrets = [path.read_text().strip().encode() for path in own if path.exists()]
    secrets += [line for secret in secrets if b"\n" in secret for line in secret.splitlines() if len(line) > 40]

    def shown_by_processes():
        for process in Path("/proc").glob("[0-9]*"):
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    yield f"{process}/{name}", (process / name).read_bytes()

    def shown_by_files():
        for folder in (shared, Path(cluster.folder)):
            for path in folder.rglob("*"):
                if path.is_file() and path not in own:
                    yield str(path), path.read_bytes()

    job_id = echo.status().job_id
    shown = subprocess.run(
        ["scontrol", "show", "job", job_id], check=True, capture_output=True, timeout=PATIENCE
    ).stdout
    processes = list(shown_by_processes())
    assert len(job_processes(cluster)) > 5 and any(b"mii_hpc.job.engine_process" in text for _, text in processes)
    echo.terminate_server()
    eventually(lambda: not processes_of(cluster, run), PATIENCE, "the job is gone, and its files are written")
    files = list(shown_by_files())
    assert any("submitted.pkl" in name for name, _ in files) and any("rank-0.log" in name for name, _ in files)
    for name, text in [*processes, *files, ("scontrol show job", shown)]:
        assert not any(secret in text for secret in secrets), name


def test_group_member_generates_and_cannot_terminate(cluster, echo, home, group_member, second_user):
    def use(user):
        done = cluster.run_on(
            "n4", [*STRANGER, user, "use", str(home), "echo"], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    refused = "AuthenticationError"
    assert use(group_member) == {
        "generate": "hello ",
        "status": "done",
        "rotate_token": refused,
        "terminate_server": refused,
    }
    assert set(use(second_user).values()) <= {"DeploymentNotFoundError", "RegistryError"}
    assert echo.status().state == "ready"


def test_rotated_token_fails_and_a_running_stream_finishes(echo, home):
    run = run_dir_of(echo)
    old = credentials.load_owner(run)
    words = [f"word{number}" for number in range(100)]
    pieces = echo.stream(" ".join(words))
    first = next(pieces)
    echo.rotate_token()
    assert credentials.load_owner(run).token != old.token
    assert "".join(str(piece) for piece in [first, *pieces]).split() == words
    assert str(echo("new token")[0]) == "new token "
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(credentials, "load_owner", lambda _run: old)
        patch.setattr(clients, "CONNECT_SECONDS", (3.0,))
        with mii.MIIClient(echo.mii_config) as stale, pytest.raises(mii.UnavailableError):
            stale("old token")


def test_hostile_shared_home_of_a_second_user(cluster, shared, second_user, tmp_path):
    mine = RunDir.create(MIIConfig(deployment_name="good", home=tmp_path / "mine"))
    keys = credentials.create(mine)
    entry = Entry.of(MIIConfig(deployment_name="good", cluster="slurm"), mine.path, keys.fingerprint)
    told = {"certificate": keys.certificate.decode(), "identity": keys.identity.decode()}
    told["entry"] = json.loads(entry.model_dump_json())
    his = shared / "his"
    his.mkdir()
    shutil.chown(his, second_user)
    sharing = [*STRANGER, second_user, "share", str(his), json.dumps(told)]
    subprocess.run(sharing, check=True, cwd=REPOSITORY, timeout=60)

    def cli(*arguments):
        environment = {**os.environ, "MII_HPC_PATH": str(his), "MII_HPC_HOME": str(tmp_path / "mine")}
        command = [sys.executable, "-m", "mii_hpc", *arguments]
        return subprocess.run(
            command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE
        )

    listed = cli("ls")
    assert listed.returncode == 0 and "\x1b" not in listed.stdout + listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["NAME", "escapes", "good"]
    assert "\\x1b]0;owned\\x07" in listed.stdout
    assert len(listed.stderr.splitlines()) == 6, "a sentence for each of the others"
    for name in ("fifo", "endless", "link", "command", "shell", "other"):
        refused = cli("env", name)
        assert refused.returncode != 0 and not refused.stdout and "Traceback" not in refused.stderr, name
    with pytest.raises(mii.RegistryError, match="is not a regular file"):
        SharedHome(his).get("fifo")


def test_modules_that_a_second_user_plants_are_not_imported(cluster, shared, home, second_user, monkeypatch):
    folder = shared / "writable"
    folder.mkdir()
    folder.chmod(0o777)
    subprocess.run([*STRANGER, second_user, "plant", str(folder)], check=True, cwd=REPOSITORY, timeout=60)
    assert {path.stat().st_uid for path in folder.iterdir()} == {pwd.getpwnam(second_user).pw_uid}
    monkeypatch.chdir(folder)
    client = mii.serve(replica_num=2, deployment_name="planted", cluster="slurm", home=home, **ECHO)
    assert str(client("hello")[0]) == "hello "
    (rank, *_) = processes_of(cluster, run_dir_of(client))
    assert Path(f"/proc/{rank}/cwd").readlink() == folder
    client.terminate_server()
    assert imported(folder) == []


def test_false_server_on_the_port_gets_nothing(cluster, echo, home, tmp_path, monkeypatch):
    monkeypatch.setattr(clients, "CONNECT_SECONDS", (3.0,))
    registry = Registry(home)
    entry, path = registry.get("echo"), registry.folder / "echo.json"
    text = path.read_text()
    echo.terminate_server()
    eventually(lambda: not processes_of(cluster, RunDir(entry.run_dir)), PATIENCE, "the job is gone")
    path.write_text(text)  # as if it had died without a word
    heard = tmp_path / "heard"
    certificate = credentials.create(RunDir.create(echo.mii_config.model_copy(update={"home": tmp_path / "his"})))
    his = next((tmp_path / "his" / "runs").iterdir()) / "credentials"
    host, port = entry.address.split(":")
    false = cluster.popen_on(
        entry.host, [sys.executable, "-c", FALSE_SERVER, host, port, his / "tls.crt", his / "tls.key", heard]
    )
    try:
        eventually(heard.exists, PATIENCE, "he listens")
        refused = (mii.UnavailableError, mii.DeploymentNotFoundError)  # by when Slurm knows that the job has ended
        with mii.MIIClient(echo.mii_config) as client, pytest.raises(refused):
            client(PROMPT)
    finally:
        false.kill()
        false.wait(PATIENCE)
        path.unlink()
    said = heard.read_bytes()
    assert b"connected" in said and certificate.fingerprint != entry.fingerprint
    token = credentials.read_token(RunDir(entry.run_dir).owner_token)
    assert PROMPT.encode() not in said and token.encode() not in said and b"POST" not in said and b"data:" not in said


def test_thousand_idle_connections(cluster, echo):
    entry = Registry(echo.mii_config.home).get("echo")
    host, port = entry.address.split(":")
    (balancer,) = processes_of(cluster, run_dir_of(echo), "mii_hpc.job.balancer")
    echo(["warm"] * 16)
    before = resources(balancer)
    with contextlib.ExitStack() as opened, concurrent.futures.ThreadPoolExecutor(16) as threads:
        crowd = opened.enter_context(Crowd((host, int(port)), size=1000))
        words = " ".join(str(number) for number in range(200))
        asked = [threads.submit(echo, words, timeout=120) for _ in range(16)]
        assert [str(future.result()[0]).strip() for future in asked] == [words] * 16
        eventually(lambda: crowd.most_at_once >= 900, PATIENCE, "they are a crowd")
        eventually(lambda: crowd.closed_by_server > 1000, PATIENCE, "each is sent away")
    eventually(lambda: resources(balancer)["files"] <= before["files"] + 8, PATIENCE, "its open files are back")
    eventually(lambda: resources(balancer)["memory"] < before["memory"] * 1.25, PATIENCE, "its memory is back")


@pytest.mark.parametrize("way", ["silent", "rubbish", "tls"])
def test_connection_without_a_token_is_closed(echo, way):
    host, port = Registry(echo.mii_config.home).get("echo").address.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=PATIENCE) as raw,
        contextlib.suppress(ConnectionError, ssl.SSLError),  # wherever it is when it is closed
    ):
        connection = raw
        if way == "rubbish":
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
        elif way == "tls":
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.set_alpn_protocols(["h2"])
            connection = context.wrap_socket(raw)
        while connection.recv(4096):
            pass


FALSE_SERVER = """
import socket, ssl, sys
host, port, certificate, key, heard = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
context.set_alpn_protocols(["h2"])
server = socket.create_server((host, int(port)))
with open(heard, "wb", buffering=0) as out:
    while True:
        connection, _ = server.accept()
        out.write(b"connected\\n")
        connection.settimeout(3)
        try:
            tls = context.wrap_socket(connection, server_side=True)
            while data := tls.recv(65536):
                out.write(b"data:" + data)
        except OSError as error:
            out.write(repr(error).encode() + b"\\n")
"""


def resources(pid):
    memory = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return {"files": len(list(Path(f"/proc/{pid}/fd").iterdir())), "memory": int(memory[1]) * 1024}


def bridge_of(cluster: Cluster):
    routes = subprocess.run(
        ["ip", "route", "get", cluster.address("n1")], check=True, capture_output=True, text=True, timeout=30
    )
    return re.search(r" dev (\S+)", routes.stdout)[1]


class Capture:
    """All that crosses a network interface, as bytes."""

    def __init__(self, interface):
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
        self._socket.bind((interface, 0))
        # A bridge shows only what is meant for the host, unless it is asked for more.
        membership = socket.if_nametoindex(interface).to_bytes(4, sys.byteorder) + (1).to_bytes(2, sys.byteorder)
        self._socket.setsockopt(263, 1, membership + bytes(10))  # SOL_PACKET, PACKET_ADD_MEMBERSHIP, promiscuous
        self._socket.settimeout(0.5)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self.bytes = b""

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        self._socket.close()

    def _read(self):
        packets = []
        while not self._done.is_set():
            with contextlib.suppress(TimeoutError):
                packets.append(self._socket.recv(65536))
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # what has come by then
            while True:
                packets.append(self._socket.recv(65536))
        self.bytes = b"".join(packets)


class Crowd:
    """Connections that say nothing, or nonsense, and come again when they are closed."""

    def __init__(self, address, size):
        self._address, self._size = address, size
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._press)
        self.most_at_once = self.closed_by_server = 0

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _press(self):
        opened, number = set(), 0
        poller = select.poll()
        by_descriptor = {}
        while not self._done.is_set():
            for _ in range(min(100, self._size - len(opened))):
                connection = socket.create_connection(self._address, timeout=PATIENCE)
                number += 1
                if number % 2:
                    connection.sendall(os.urandom(64))
                opened.add(connection)
                by_descriptor[connection.fileno()] = connection
                poller.register(connection, select.POLLIN | select.POLLHUP)
            self.most_at_once = max(self.most_at_once, len(opened))
            for descriptor, _ in poller.poll(20):
                connection = by_descriptor[descriptor]
                try:
                    gone = not connection.recv(4096)
                except OSError:
                    gone = True
                if gone:
                    poller.unregister(descriptor)
                    opened.discard(connection)
                    del by_descriptor[descriptor]
                    connection.close()
                    self.closed_by_server += 1
        for connection in opened:
            connection.close()
