import asyncio
import os
import subprocess
import sys
import threading
import time

import grpc
import grpc.aio
import pytest

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.deployments import credentials
from mii_hpc.deployments.credentials import ClientCredentials
from mii_hpc.deployments.registry import Registry
from mii_hpc.errors import AuthenticationError, InvalidRequestError, UnavailableError
from mii_hpc.job import balancer
from mii_hpc.job.balancer import Doors, LiveReplica, Router
from mii_hpc.job.net import reserve_port
from mii_hpc.rpc import transport, wire
from mii_hpc.rpc.wire import Place
from mii_hpc.schedulers.local import JOB_ID
from tests.live import Deployment, until

METHODS = (wire.GENERATE, wire.LOAD, wire.STATUS, wire.TERMINATE, wire.ROTATE_TOKEN, wire.ATTEND)


def routed(router, count):
    return [router.next().index for _ in range(count)]


def live(index):
    return LiveReplica(index, 1, f"node{index}", None)


def test_the_router_is_strict():
    router = Router()
    with pytest.raises(UnavailableError):
        router.next()
    for index in (2, 0, 1):
        router.add(live(index))
    assert routed(router, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert router.remove(1).index == 1
    assert router.remove(1) is None
    assert sorted(routed(router, 4)) == [0, 0, 2, 2]
    router.add(live(1))
    assert sorted(routed(router, 6)) == [0, 0, 1, 1, 2, 2]
    assert sum(router.served.values()) == 17
    assert [replica.index for replica in router.live] == [0, 1, 2]


async def test_status_answers_while_a_replica_is_lost(deploy):
    deployment = await deploy(replica_num=2)
    lost = deployment.balancer.router.live[1]
    asking = asyncio.gather(*(deployment.client().status() for _ in range(20)))
    await asyncio.sleep(0)
    await lost.channel.close()
    answers = await asyncio.wait_for(asking, 10)
    assert all(status.replicas[0].load is not None for status in answers)


def test_a_list_takes_consecutive_turns_in_whatever_order_it_arrives():
    router = Router()
    for index in range(3):
        router.add(live(index))
    router.next()
    arrivals = [
        Place("a", 2, 4),
        Place("b", 1, 2),
        Place("a", 0, 4),
        None,
        Place("a", 3, 4),
        Place("b", 0, 2),
        Place("a", 1, 4),
    ]
    # One request before, then four turns of a, two of b, and one more request.
    assert [router.next(place).index for place in arrivals] == [turn % 3 for turn in (3, 6, 1, 7, 4, 5, 2)]
    assert router.next().index == 8 % 3


def test_a_forgotten_list_does_no_harm(monkeypatch):
    monkeypatch.setattr(balancer, "LISTS_REMEMBERED", 2)
    router = Router()
    router.add(live(0))
    for call in "abcabc":
        assert router.next(Place(call, 0, 2)).index == 0
    assert len(router._lists) == 2


@pytest.mark.parametrize("text", ["", "a", "a/1", "a/1/2/3", "a/-1/2", "a/x/2", "a/2/2", "a/²/3"])
def test_what_names_no_place_counts_like_any_request(text):
    assert Place.parse(text) is None
    assert Place.parse(str(Place("a", 1, 2))) == Place("a", 1, 2)


async def answer_to(address, path, token, certificate, *, payload=b"", plaintext=False):
    """Make a call and return its status code, and the error class that the answer names."""
    if plaintext:
        channel = grpc.aio.insecure_channel(address)
    else:
        channel = transport.open_channel(address, ClientCredentials(certificate, token or ""))
    metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
    async with channel:
        call = channel.unary_stream(path)(payload, metadata=metadata, timeout=5)
        try:
            await call.read()
            return await call.code(), None
        except grpc.aio.AioRpcError as failure:
            return failure.code(), wire.own_error_name(failure)
        finally:
            call.cancel()


@pytest.mark.parametrize("token", [None, "", "wrong", "Bearer wrong"])
async def test_strangers_are_refused_on_every_method(deploy, token):
    deployment = await deploy()
    replica = deployment.ranks[0]._report.address
    for address in (deployment.address, replica):
        for path in (*(method.path for method in METHODS), "/no.such/Method"):
            code, _ = await answer_to(address, path, token, deployment.keys.certificate)
            assert code is grpc.StatusCode.UNAUTHENTICATED, (address, path)
    assert deployment.state() == "ready"


@pytest.mark.parametrize("shared", [False, True])
async def test_each_token_opens_its_own_doors(deploy, shared):
    deployment = await deploy()
    config = deployment.config.model_copy(update={"share": "group:users"}) if shared else deployment.config
    run, doors = deployment.run, Doors(deployment.run, config)

    def opened_by(file):
        token = credentials.read_token(file)
        return {method.name for method in METHODS if doors.admits(method.path, token)}

    assert opened_by(run.owner_token) == {"Generate", "Status", "Terminate", "RotateToken"}
    assert opened_by(run.guest_token) == ({"Generate", "Status"} if shared else set())
    assert opened_by(run.rank_token) == {"Attend"}


async def test_a_replica_answers_only_the_jobs_own_processes(deploy):
    deployment = await deploy()
    replica = deployment.ranks[0]._report.address
    for file, expected in (
        (deployment.run.rank_token, grpc.StatusCode.OK),
        (deployment.run.owner_token, grpc.StatusCode.UNAUTHENTICATED),
        (deployment.run.guest_token, grpc.StatusCode.UNAUTHENTICATED),
    ):
        token = credentials.read_token(file)
        assert (await answer_to(replica, wire.LOAD.path, token, deployment.keys.certificate))[0] is expected


async def test_without_tls_or_with_another_certificate_there_is_no_connection(deploy):
    deployment, other = await deploy(), await deploy(name="other")
    token = credentials.read_token(deployment.run.owner_token)
    for method in METHODS:
        code, _ = await answer_to(deployment.address, method.path, token, b"", plaintext=True)
        assert code is grpc.StatusCode.UNAVAILABLE
    code, _ = await answer_to(deployment.address, wire.STATUS.path, token, other.keys.certificate)
    assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_rotated_token_opens_nothing(deploy):
    deployment = await deploy(echo_delay=0.01)
    old = credentials.load_owner(deployment.run)
    running = asyncio.create_task(deployment.client().generate("a", max_new_tokens=50))
    await until(lambda: not deployment.is_idle())
    assert (await answer_to(deployment.address, wire.ROTATE_TOKEN.path, old.token, old.certificate))[0] is (
        grpc.StatusCode.OK
    )
    code, _ = await answer_to(deployment.address, wire.STATUS.path, old.token, old.certificate)
    assert type(wire.error_of(grpc.aio.AioRpcError(code, None, None))) is AuthenticationError
    assert (await running)[0].generated_length == 50, "what was admitted goes on"
    assert credentials.load_owner(deployment.run).token != old.token
    await deployment.client().generate("x")


async def test_bytes_pass_through_unread(deploy):
    """It is the replica that refuses them, and the refusal comes back as it was."""
    deployment = await deploy(replica_num=1)
    owner = credentials.load_owner(deployment.run)
    for payload in (b"garbage", b"\xff" * 10_000):
        code, name = await answer_to(
            deployment.address, wire.GENERATE.path, owner.token, owner.certificate, payload=payload
        )
        assert (code, name) == (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError.__name__)
    assert deployment.balancer.router.served == {0: 2}


async def test_the_entry_tells_where_it_is_and_how_it_does(deploy, monkeypatch):
    monkeypatch.setattr(balancer, "HEARTBEAT_SECONDS", 0.02)
    deployment = await deploy()
    entry = deployment.registry.get("chat")
    assert (entry.state, entry.address, entry.detail) == ("ready", deployment.address, "2 of 2 replicas ready")
    assert entry.fingerprint == credentials.load_owner(deployment.run).fingerprint
    await until(lambda: deployment.registry.get("chat").heartbeat > entry.heartbeat)


async def test_a_broken_filesystem_does_not_end_the_deployment(deploy, monkeypatch):
    monkeypatch.setattr(balancer, "HEARTBEAT_SECONDS", 0.02)
    deployment = await deploy()
    real, failed = Registry.publish, []

    def full(self, entry):
        if len(failed) < 3:
            failed.append(entry)
            raise OSError(28, "No space left on device")
        real(self, entry)

    monkeypatch.setattr(Registry, "publish", full)
    await until(lambda: len(failed) == 3)
    last = deployment.registry.get("chat").heartbeat
    await until(lambda: deployment.registry.get("chat").heartbeat > last)


async def test_a_deployment_that_lost_its_name_ends(deploy, monkeypatch):
    monkeypatch.setattr(balancer, "HEARTBEAT_SECONDS", 0.02)
    deployment = await deploy()
    deployment.registry.withdraw(deployment.entry)
    await asyncio.wait_for(deployment.working, 10)
    assert [rank.left for rank in deployment.ranks] == ["", ""]


async def test_a_slow_write_does_not_come_after_the_withdrawal(deploy, monkeypatch):
    deployment = await deploy()
    real, writing, ended = Registry.publish, threading.Event(), threading.Event()

    def slow(self, entry):
        writing.set()
        ended.wait(0.5)
        real(self, entry)

    monkeypatch.setattr(Registry, "publish", slow)
    deployment.balancer._dirty.set()
    await until(writing.is_set)
    deployment.balancer.stop("for the test")
    await deployment.working
    ended.set()
    assert deployment.state() is None


async def test_a_rank_that_is_signalled_ends_the_deployment(deploy):
    deployment = await deploy(tensor_parallel=2)
    deployment.ranks[3].tell(leaving=True)
    await asyncio.wait_for(deployment.working, 10)
    assert deployment.state() is None
    assert [rank.left for rank in deployment.ranks] == [""] * 4


class Loading(Deployment):
    """A deployment of which nothing is waited for; its engines never come up."""

    startup_timeout = 1800.0

    async def start(self):
        self.config = self.config.model_copy(update={"startup_timeout": self.startup_timeout})
        self.address = await self.start_balancer()
        self.start_ranks()
        for rank in self.ranks:
            rank.comes_back = False
        return self


async def test_an_engine_that_dies_while_loading_fails_the_deployment(deploy):
    deployment = await deploy(Loading)
    rank = deployment.ranks[1]
    await until(lambda: rank.epochs)
    rank.tell(engine=pb.DOWN, epoch=1, detail="RuntimeError: no weights", log="Traceback ...")
    await asyncio.wait_for(deployment.working, 10)
    failure = deployment.run.read_failure()
    assert failure.message == "rank 1 (replica 1, host node1): RuntimeError: no weights"
    assert (failure.rank, failure.host, failure.log) == (1, "node1", "Traceback ...")
    assert [rank.left for rank in deployment.ranks] == [failure.message] * 2
    assert deployment.state() is None


class Impatient(Loading):
    startup_timeout = 0.2


async def test_a_deployment_that_does_not_become_ready_fails(deploy):
    deployment = await deploy(Impatient)
    await asyncio.wait_for(deployment.working, 10)
    assert deployment.run.read_failure().message.startswith("not ready after startup_timeout=0 s: replica 0: ")


class OwnProcess(Deployment):
    """A deployment whose balancer is the real process."""

    async def start_balancer(self):
        self.reserved = reserve_port("127.0.0.1")
        self.address = f"127.0.0.1:{self.reserved.getsockname()[1]}"
        self.start_process()
        return self.address

    def start_process(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mii_hpc.job.balancer", str(self.run.path), self.address, "0"],
            env={**os.environ, JOB_ID: str(self.job.pid)},
            stderr=subprocess.DEVNULL,
        )

    async def stop_balancer(self):
        self.process.kill()
        self.process.wait()
        self.reserved.close()


async def test_a_new_balancer_adopts_the_running_engines(deploy):
    deployment = await deploy(OwnProcess, tensor_parallel=2, echo_delay=0.005)
    client = deployment.client()
    await client.generate("before")
    running = asyncio.create_task(client.generate(["a"] * 6, max_new_tokens=10**6))
    await until(lambda: [stats.running for stats in deployment.stats()[:2]] == [3, 3])
    heartbeat = deployment.registry.get("chat").heartbeat
    deployment.process.kill()
    deployment.process.wait()
    with pytest.raises(UnavailableError) as failure:
        await running
    assert [type(error) for error in failure.value.responses] == [UnavailableError] * 6
    await until(deployment.is_idle)
    deployment.start_process()
    await until(lambda: (entry := deployment.registry.get("chat")).heartbeat > heartbeat and entry.state == "ready")
    assert sorted(r.replica for r in await client.generate(["a", "b"])) == [0, 1]
    status = await client.status()
    assert [(replica.state, replica.epoch) for replica in status.replicas] == [("ready", 1), ("ready", 1)]
    assert [rank.epochs for rank in deployment.ranks] == [[1]] * 4
    assert status.started == deployment.registry.get("chat").started < time.time()


async def test_a_balancer_without_a_claim_does_not_serve(tmp_path):
    deployment = OwnProcess(tmp_path)
    deployment.registry.withdraw(deployment.entry)
    await deployment.start_balancer()
    assert await asyncio.to_thread(deployment.process.wait, 20) == 1
    await deployment.stop()
