import grpc
import grpc.aio
import pytest

from mii_hpc.deployments import credentials
from mii_hpc.errors import InvalidRequestError, RequestError
from mii_hpc.job.balancer import relay
from mii_hpc.rpc import transport, wire
from mii_hpc.rpc.wire import Method
from tests.waiting import PATIENCE


async def test_bytes_pass_through_unread(deploy):
    """It is the replica that refuses them, and the refusal comes back as it was."""
    deployment = await deploy(replica_num=1)
    owner = credentials.load_owner(deployment.run)
    for payload in (b"garbage", b"\xff" * 10_000):
        async with transport.open_channel(deployment.address, owner) as channel:
            call = channel.unary_stream(Method.GENERATE)(
                payload, metadata=transport.authorization(owner), timeout=PATIENCE
            )
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await call.read()
        error = wire.error_of(failure.value)
        assert (failure.value.code(), type(error)) == (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError)
        assert (error.deployment_name, error.replica, error.host) == ("chat", 0, "node0")
    assert deployment.balancer.router.served == {0: 2}


class Handler:
    """A call of the owner's, as gRPC makes it, without a client in between."""

    def __init__(self, deployment):
        self.owner = credentials.load_owner(deployment.run)
        self.address = deployment.address

    async def error(self, *messages):
        async with transport.open_channel(self.address, self.owner) as channel:
            call = channel.stream_stream(Method.GENERATE)(metadata=transport.authorization(self.owner), timeout=10)
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                for message in messages:
                    await call.write(message)
                await call.done_writing()
                while await call.read() is not grpc.aio.EOF:
                    pass
        assert not wire.is_lost(failure.value)
        return wire.error_of(failure.value)


async def test_what_a_request_breaks_is_its_own(deploy, monkeypatch):
    """Whatever a handler raises, at the balancer or the replica, takes no replica out."""
    deployment = await deploy(replica_num=1)
    ask = Handler(deployment)
    assert type(await ask.error()) is InvalidRequestError, "a call that is closed without a request"

    def broken(_payload):
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(wire, "unpack_request", broken)
        error = await ask.error(b"")
    assert (type(error), str(error)) == (RequestError, "the request has failed: ZeroDivisionError: a bug")
    with monkeypatch.context() as patch:
        patch.setattr(deployment.balancer.router, "next", broken)
        assert "ZeroDivisionError" in str(await ask.error(b""))
    assert deployment.balancer.membership.replicas[0].state == "ready"
    assert deployment.ranks[0].epochs == [1]
    await deployment.client().generate("x")


async def test_messages_above_the_limit_are_their_sender_s(deploy, monkeypatch):
    deployment = await deploy(replica_num=1)
    client = deployment.client()
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(InvalidRequestError, match=r"^prompt: the request has \d+ bytes; 100 are allowed$"):
        await client.generate("x" * 101)
    with pytest.raises(InvalidRequestError, match=r"^a piece of the answer has \d+ bytes; 100 are allowed$"):
        await client.generate("y" * 60, return_full_text=True)
    assert deployment.ranks[0].epochs == [1]


async def test_long_words_travel(deploy, monkeypatch):
    def long(_payload):
        raise InvalidRequestError("é" * 10**6)

    deployment = await deploy(replica_num=1)
    monkeypatch.setattr(wire, "unpack_request", long)
    assert str(await Handler(deployment).error(b"")) == "é" * wire.MAX_WORDS + " ..."


async def test_a_call_without_a_request_is_ended(deploy, monkeypatch):
    """Streams that say nothing cost us and not who opens them."""
    monkeypatch.setattr(relay, "FIRST_MESSAGE_SECONDS", 0.05)
    deployment = await deploy(replica_num=1)
    owner = credentials.load_owner(deployment.run)
    async with transport.open_channel(deployment.address, owner) as channel:
        call = channel.stream_stream(Method.GENERATE)(metadata=transport.authorization(owner), timeout=PATIENCE)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.read()
    assert str(wire.error_of(failure.value)) == "the call has had no request within 0 s"
