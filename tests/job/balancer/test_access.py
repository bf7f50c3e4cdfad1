import asyncio
import dataclasses
import errno
import grp
import math
import os
from pathlib import Path

import grpc
import grpc.aio
import pytest

from mii_hpc.clients import asynchronous
from mii_hpc.deployments import credentials, sharing
from mii_hpc.errors import AuthenticationError, QueueFullError, RequestCancelledError, RequestError
from mii_hpc.job.balancer import pace, relay, service
from mii_hpc.job.balancer.access import Access
from mii_hpc.rpc import transport, wire
from mii_hpc.rpc.wire import Method
from tests.waiting import PATIENCE, until

SHARED = f"group:{grp.getgrgid(os.getgid()).gr_name}"


async def answer_to(address, path, token, keys, *, plaintext=False, connects=True):
    """Make a call with the certificates of some keys, and return its status code.

    Where it `connects`, it is tried again when the machine is too slow for a handshake in time; else once.
    """
    channel = grpc.aio.insecure_channel(address) if plaintext else transport.open_channel(address, keys)
    metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
    async with channel:
        call = channel.unary_stream(path)(b"", metadata=metadata, timeout=PATIENCE, wait_for_ready=connects)
        try:
            await call.read()
            return await call.code()
        except grpc.aio.AioRpcError as failure:
            return failure.code()
        finally:
            call.cancel()


@pytest.mark.parametrize("token", [None, "", "wrong", "Bearer wrong"])
async def test_a_wrong_token_is_refused_on_every_method(deploy, token):
    deployment = await deploy()
    replica = deployment.ranks[0].report.address
    for address in (deployment.address, replica):
        for path in (*(method for method in Method), "/no.such/Method"):
            code = await answer_to(address, path, token, deployment.keys.as_client)
            assert code is grpc.StatusCode.UNAUTHENTICATED, (address, path)
    assert deployment.state() == "ready"


async def test_without_a_certificate_of_the_deployment_there_is_no_connection(deploy):
    """However good the token is: so a stranger gets no stream, and none of its costs."""
    deployment, other = await deploy(share=SHARED), await deploy(name="other")
    run, replica = deployment.run, deployment.ranks[0].report.address
    ranks, owner = deployment.keys.as_client, credentials.load_owner(run)
    guest = sharing.read(deployment.config.home, "chat")[1]
    foreign = credentials.load_owner(other.run).identity, other.keys.as_client.identity
    ok, refused = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
    for identity, token, at_balancer, at_replica in (
        (b"", owner.token, refused, refused),
        *((identity, token, refused, refused) for identity in foreign for token in (owner.token, ranks.token)),
        (owner.identity, owner.token, ok, refused),
        (guest.identity, guest.token, ok, refused),
        (ranks.identity, ranks.token, grpc.StatusCode.UNAUTHENTICATED, ok),
    ):
        keys = dataclasses.replace(owner, identity=identity)
        for address, method, expected in (
            (deployment.address, Method.STATUS, at_balancer),
            (replica, Method.LOAD, at_replica),
        ):
            assert (await answer_to(address, method, token, keys, connects=expected is not refused)) is expected


async def test_guests_of_what_is_not_shared_do_not_connect(deploy):
    deployment = await deploy()
    guest = credentials.read_identity(deployment.run.guest_identity)
    keys = dataclasses.replace(deployment.keys.as_client, identity=guest)
    code = await answer_to(deployment.address, Method.STATUS, keys.token, keys, connects=False)
    assert code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("shared", [False, True])
async def test_each_token_is_for_its_own_methods(deploy, shared):
    deployment = await deploy()
    config = deployment.config.model_copy(update={"share": "group:users"}) if shared else deployment.config
    run, access = deployment.run, Access(deployment.run, config)

    def open_to(file):
        token = credentials.read_token(file)
        return {method.name for method in Method if access.admits(method, token)}

    assert open_to(run.owner_token) == {"GENERATE", "TOKENIZE", "DESCRIBE", "STATUS", "TERMINATE", "ROTATE_TOKEN"}
    assert open_to(run.guest_token) == ({"GENERATE", "TOKENIZE", "DESCRIBE", "STATUS"} if shared else set())
    assert open_to(run.rank_token) == {"JOIN"}


async def test_a_replica_answers_only_the_jobs_own_processes(deploy):
    deployment = await deploy()
    replica = deployment.ranks[0].report.address
    for file, expected in (
        (deployment.run.rank_token, grpc.StatusCode.OK),
        (deployment.run.owner_token, grpc.StatusCode.UNAUTHENTICATED),
        (deployment.run.guest_token, grpc.StatusCode.UNAUTHENTICATED),
    ):
        token = credentials.read_token(file)
        assert (await answer_to(replica, Method.LOAD, token, deployment.keys.as_client)) is expected


async def test_without_tls_or_to_another_certificate_there_is_no_connection(deploy):
    deployment, other = await deploy(), await deploy(name="other")
    token = credentials.read_token(deployment.run.owner_token)
    for method in Method:
        code = await answer_to(deployment.address, method, token, None, plaintext=True, connects=False)
        assert code is grpc.StatusCode.UNAVAILABLE
    keys = dataclasses.replace(deployment.keys.as_client, certificate=other.keys.certificate)
    code = await answer_to(deployment.address, Method.STATUS, token, keys, connects=False)
    assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_rotated_token_opens_nothing(deploy, held):
    deployment = await deploy(echo_delay=0.01)
    old = credentials.load_owner(deployment.run)
    others = [deployment.client(), deployment.client()]
    for client in others:
        await client.generate("x")
    running = asyncio.create_task(deployment.client().generate("a", max_new_tokens=50))
    await until(lambda: not deployment.is_idle())
    async with transport.open_channel(deployment.address, old) as channel:  # a connection of before goes on
        metadata = transport.authorization(old)
        await channel.unary_unary(Method.ROTATE_TOKEN)(b"", metadata=metadata, wait_for_ready=True)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(Method.STATUS)(b"", metadata=metadata)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    code = await answer_to(deployment.address, Method.STATUS, old.token, old, connects=False)
    assert code is grpc.StatusCode.UNAVAILABLE
    half = dataclasses.replace(credentials.load_owner(deployment.run), token=old.token)
    code = await answer_to(deployment.address, Method.STATUS, old.token, half)
    assert type(wire.error_of(grpc.aio.AioRpcError(code, None, None))) is AuthenticationError
    held.set()
    assert (await running)[0].generated_length == 50, "what was admitted goes on"
    new = credentials.load_owner(deployment.run)
    assert new.token != old.token and new.identity != old.identity and new.certificate == old.certificate
    await deployment.client().generate("x")
    await others[0].generate("x"), await others[1].status()


async def test_a_rotation_that_cannot_be_written_changes_nothing(deploy, monkeypatch):
    deployment = await deploy()
    run, client = deployment.run, deployment.client()
    before = {path: path.read_bytes() for path in run.credentials.iterdir()}
    real, written = os.fsync, []

    def full(descriptor):
        if run.credentials in Path(f"/proc/self/fd/{descriptor}").readlink().parents:  # the entry is written, too
            written.append(descriptor)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RequestError, match="No space left on device"):
        await client.rotate_token()
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in run.credentials.iterdir()} == before, "nor is anything left aside"
    assert str((await client.generate("x"))[0]) == "x "
    await deployment.client().rotate_token()
    await client.generate("y")


async def test_a_rotation_may_end_what_guests_have_in_hand(deploy, held):
    deployment = await deploy(echo_delay=0.01, share=SHARED)
    owner = deployment.client()
    guest = deployment.guest()
    await guest.generate("x")
    endless = asyncio.create_task(guest.generate("a", max_new_tokens=100_000))
    running = asyncio.create_task(owner.generate("a", max_new_tokens=100))
    await until(lambda: sum(stats.running for stats in deployment.stats()) == 2)
    await deployment.client().rotate_token(cancel_guests=True)
    with pytest.raises(RequestCancelledError, match="the owner has taken the guests' token back"):
        await endless
    held.set()
    assert (await running)[0].generated_length == 100
    await until(deployment.is_idle)
    assert all(rank.epochs == [1] for rank in deployment.ranks), "no replica was taken for lost"
    assert str((await guest.generate("x"))[0]) == "x ", "his client has read the new token and certificate"


@pytest.mark.parametrize("remembered", [0.0, 2 * PATIENCE])
async def test_guests_are_held_to_their_limits_and_the_owner_gets_in(deploy, monkeypatch, remembered):
    """Also where the balancer refuses by what a replica has said."""
    monkeypatch.setattr(relay, "FULL_SECONDS", remembered)
    limits = {"guest_running": 1, "guest_waiting": 2}
    deployment = await deploy(replica_num=1, echo_delay=0.001, share=SHARED, limits=limits)
    guest, calls = deployment.guest(), []
    for load in ((1, 0), (1, 1), (1, 2)):
        calls.append(asyncio.create_task(guest.generate("a", max_new_tokens=10**6)))
        await until(lambda load=load: [(each.running, each.waiting) for each in deployment.stats()] == [load])
    refusal = r"^2 requests are waiting, and limits\.guest_waiting=2 are allowed; try again later$"
    for _ in range(2):
        with pytest.raises(QueueFullError, match=refusal):
            await guest.generate("a")
    assert str((await deployment.client().generate("x"))[0]) == "x "
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await until(deployment.is_idle)
    if remembered:
        with pytest.raises(QueueFullError, match=refusal):
            await guest.generate("a")
    else:
        assert str((await guest.generate("x"))[0]) == "x "


async def test_guests_calls_are_bounded_and_the_owners_are_not(deploy):
    deployment = await deploy(replica_num=1, share=SHARED, limits={"guest_calls": 2})
    keys, owner = sharing.read(deployment.config.home, "chat")[1], deployment.client()
    async with transport.open_channel(deployment.address, keys) as channel:
        await channel.channel_ready()
        method, metadata = channel.stream_stream(Method.GENERATE), transport.authorization(keys)
        calls = [method(metadata=metadata) for _ in range(2)]
        await until(lambda: deployment.balancer.relay.guest_calls == 2)
        guest = deployment.guest()
        refusal = r"^2 calls are open, and limits\.guest_calls=2 are allowed; try again later$"
        for ask in (guest.generate, guest.tokenize):
            with pytest.raises(QueueFullError, match=refusal):
                await ask("x")
        with pytest.raises(QueueFullError, match=refusal):
            await guest.status()
        for _ in range(3):
            assert str((await owner.generate("x"))[0]) == "x "
            await owner.tokenize("x")
            assert (await deployment.client().status()).state == "ready"
        for call in calls:
            call.cancel()
        await until(lambda: deployment.balancer.relay.guest_calls == 0)
        assert str((await guest.generate("x"))[0]) == "x "


async def test_long_requests_of_guests_wait_for_each_other_and_the_owners_for_none(deploy, monkeypatch):
    monkeypatch.setattr(pace, "BYTES_PER_SECOND", 1)
    deployment = await deploy(replica_num=1, share=SHARED, limits={"guest_waiting_bytes": 132_000})
    guest, owner, long = deployment.guest(), deployment.client(), "a" * pace.LONG_BYTES
    await guest.generate(long, max_new_tokens=1)
    waiting = [asyncio.create_task(guest.generate(long, max_new_tokens=1)), asyncio.create_task(guest.tokenize(long))]
    await until(lambda: deployment.balancer.relay.pace.waiting >= 2 * pace.LONG_BYTES)
    for ask in (guest.generate, guest.tokenize):
        with pytest.raises(QueueFullError, match=r"limits\.guest_waiting_bytes=132000 are allowed"):
            await ask(long)
    await owner.generate(long, max_new_tokens=1)
    await owner.tokenize("a")
    await guest.generate("a", max_new_tokens=1)
    for call in waiting:
        call.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_calls_of_guests_wait_for_each_other_and_the_owners_for_none(deploy, monkeypatch):
    monkeypatch.setattr(relay, "GUESTS_REST", math.inf)
    monkeypatch.setattr(relay, "MOST_REST", 10 * PATIENCE)
    monkeypatch.setattr(asynchronous, "ANSWER_SECONDS", 10 * PATIENCE)
    deployment = await deploy(replica_num=1, share=SHARED)
    guest, owner = deployment.guest(), deployment.client()
    await guest.tokenize("a")
    waiting = [asyncio.create_task(call) for call in (guest.tokenize("a"), guest.describe())]
    await until(lambda: deployment.balancer.relay.guest_calls == len(waiting))
    await owner.tokenize("a")
    await owner.describe()
    await guest.generate("a", max_new_tokens=1)
    await guest.status()
    assert not any(call.done() for call in waiting)
    for call in waiting:
        call.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_guests_who_ask_for_the_status_are_told_the_same_for_a_while(deploy, monkeypatch):
    monkeypatch.setattr(service, "GUESTS_SECONDS", math.inf)
    deployment = await deploy(replica_num=2, share=SHARED)
    guest, owner = deployment.guest(), deployment.client()
    assert {replica.served for replica in (await guest.status()).replicas} == {0}
    await owner.generate("a", max_new_tokens=1)
    assert sum(replica.served for replica in (await owner.status()).replicas) == 1
    assert {replica.served for replica in (await guest.status()).replicas} == {0}


async def test_a_rotation_fails_no_call_of_a_busy_client(deploy):
    """All of its calls are refused at once, and each reads the new token, also one whose fellow has read it before."""
    deployment = await deploy()
    client, answered = deployment.client(), 0
    rotated = asyncio.Event()

    async def ask():
        nonlocal answered
        while not rotated.is_set():
            await client.generate("x")
            answered += 1

    async with asyncio.TaskGroup() as busy:
        for _ in range(16):
            busy.create_task(ask())
        for turn in range(5):
            await until(lambda turn=turn: answered > 20 * (turn + 1))
            await deployment.client().rotate_token()
        rotated.set()


async def test_two_rotations_at_once_leave_the_tokens_that_are_in_the_files(deploy):
    deployment = await deploy()
    access, files = deployment.balancer.access, (deployment.run.owner_token, deployment.run.owner_identity)
    for _ in range(5):
        await asyncio.gather(*(asyncio.to_thread(access.rotate) for _ in range(4)))
        token, identity = (path.read_text() for path in files)
        assert access.admits(Method.STATUS, token)
        assert credentials.certificate_of(identity.encode()) in access.certificates


async def test_replicas_are_told_who_asks(deploy, monkeypatch):
    """And not by whoever asks."""
    deployment = await deploy(replica_num=1, share=SHARED)
    engine, callers = deployment.ranks[0].engine.engine, []
    submit = engine.submit

    def note(request, deliver):
        callers.append(request.caller)
        submit(request, deliver)

    monkeypatch.setattr(engine, "submit", note)
    await deployment.client().generate("x")
    await deployment.guest().generate("x")
    assert [role for role, _ in callers] == ["owner", "guest"]
    assert all(address.startswith("ipv4:127.0.0.1:") for _, address in callers)
