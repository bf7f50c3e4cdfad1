import asyncio

import grpc
import grpc.aio
import pytest

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.deployments import credentials
from mii_hpc.engine.echo import EchoEngine
from mii_hpc.errors import (
    AuthenticationError,
    DeploymentStoppingError,
    InvalidRequestError,
    QueueFullError,
    ReplicaLostError,
    RequestError,
    RequestTimeoutError,
    UnavailableError,
)
from mii_hpc.generation import joined
from mii_hpc.job.balancer import relay
from mii_hpc.job.balancer.relay import Relay
from mii_hpc.job.balancer.router import Router
from mii_hpc.rpc import frames, transport, wire
from mii_hpc.rpc.wire import Method
from tests.waiting import PATIENCE, until


async def test_bytes_pass_through_unread(deploy):
    """It is the replica that refuses them, and the refusal comes back as it was."""
    deployment = await deploy(replica_num=1)
    for payload in (b"garbage", b"\xff" * 10_000):
        error = await Handler(deployment).error(payload)
        assert type(error) is InvalidRequestError
        assert (error.deployment_name, error.replica, error.host) == ("chat", 0, "node0")
    assert deployment.balancer.router.served == {0: 2}


class Handler:
    """A stream of the owner's, without a client in between."""

    def __init__(self, deployment):
        self.owner = credentials.load_owner(deployment.run)
        self.address = deployment.address

    async def error(self, *payloads):
        """Send requests; return the error of the first, or that of the stream."""
        requests = [pb.NumberedRequest(number=number, request=payload) for number, payload in enumerate(payloads)]
        async with transport.open_channel(self.address, self.owner) as channel:
            metadata = transport.authorization(self.owner)
            call = channel.stream_stream(Method.GENERATE)(metadata=metadata, timeout=PATIENCE, wait_for_ready=True)
            try:
                if requests:
                    await call.write(pb.RequestFrame(requests=requests).SerializeToString())
                await call.done_writing()
                (piece,) = pb.AnswerFrame.FromString(await call.read()).pieces
            except grpc.aio.AioRpcError as failure:
                assert not wire.is_lost(failure)
                return wire.error_of(failure)
            return wire.unpack_failure(piece.failure)


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
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 120)
    with pytest.raises(InvalidRequestError, match=r"^prompt: the request has \d+ bytes; 120 are allowed$"):
        await client.generate("x" * 121)
    with pytest.raises(InvalidRequestError, match=r"^a piece of the answer has \d+ bytes; 120 are allowed$"):
        await client.generate("y" * 60, return_full_text=True)
    assert deployment.ranks[0].epochs == [1]


async def test_long_words_travel(deploy, monkeypatch):
    def long(_payload):
        raise InvalidRequestError("é" * 10**6)

    deployment = await deploy(replica_num=1)
    monkeypatch.setattr(wire, "unpack_request", long)
    assert str(await Handler(deployment).error(b"")) == "é" * wire.MAX_WORDS + " ..."


LONG = {"max_new_tokens": 60}
WORDS = "to be or not that is the question"


def assert_repeated(response, length=60):
    """It is the echo engine's whole answer, with no token lost or doubled."""
    words = [WORDS.split()[number % 8] for number in range(length)]
    assert response.generated_text == "".join(f"{word} " for word in words)
    assert (len(response.token_ids), response.generated_length, response.finish_reason) == (length, length, "length")


@pytest.mark.parametrize("notice", ["connection", "report", "error"])
async def test_what_a_lost_replica_had_in_hand_goes_on_elsewhere(deploy, held, notice):
    deployment = await deploy(echo_delay=0.01)
    client = deployment.client()
    streams = [client.stream(WORDS, logprobs=True, **LONG) for _ in range(4)]
    pieces = [[await anext(stream)] for stream in streams]
    several = {"num_return_sequences": 2, "max_new_tokens": 60}
    calls = [asyncio.create_task(client.generate(WORDS, **options)) for options in (LONG, LONG, several, several)]
    await until(lambda: [stats.running for stats in deployment.stats()] == [4, 4])
    victim = deployment.ranks[1].engine
    if notice == "connection":
        await victim.break_connections()
    if notice == "error":
        victim.engine._step = None  # it fails in its own thread
    else:
        victim.die()
    held.set()
    for stream, so_far in zip(streams, pieces, strict=True):
        so_far += [piece async for piece in stream]
    answers = [joined(so_far)[0] for so_far in pieces]
    assert [len(answer.logprobs) for answer in answers] == [60] * 4
    answers += [answer for call in calls for answer in await call]
    for answer in answers:
        assert_repeated(answer)
    migrations = [answer.migrations for answer in answers]
    assert migrations[:4] == [0, 1, 0, 1]
    assert sorted(migrations[4:]) == [0, 0, 0, 1, 1, 1]  # which call comes first is open
    assert {answer.replica for answer in answers} == {0}
    status = await client.status()
    assert [(each.migrations, each.resumed, each.lost) for each in status.replicas] == [(0, 0, 0), (4, 0, 0)]
    await until(deployment.is_idle)


async def test_a_replica_that_comes_back_takes_what_waits(deploy, held):
    deployment = await deploy(replica_num=1, echo_delay=0.01)
    client = deployment.client()
    running = [asyncio.create_task(client.generate(WORDS, **LONG)) for _ in range(3)]
    await until(lambda: deployment.stats()[0].running == 3)
    deployment.ranks[0].engine.die()
    await until(lambda: not deployment.balancer.router.live)
    late = asyncio.create_task(client.generate(["a", "b"]))
    held.set()
    for call in running:
        (answer,) = await call
        assert_repeated(answer)
        assert (answer.migrations, answer.replica) == (1, 0)
    assert [(str(answer), answer.migrations) for answer in await late] == [("a ", 0), ("b ", 0)]
    assert deployment.ranks[0].epochs == [1, 2]


async def without_a_replica(deploy, **shape):
    """Return a deployment whose one replica is lost for good, and a call that it had in hand."""
    deployment = await deploy(replica_num=1, echo_delay=0.01, **shape)
    call = asyncio.create_task(deployment.client().generate(WORDS, max_new_tokens=10**6))
    await until(lambda: deployment.stats()[0].running)
    deployment.ranks[0].comes_back = False
    deployment.ranks[0].engine.die()
    await until(lambda: not deployment.balancer.router.live)
    return deployment, call


async def test_a_request_is_held_for_a_while(deploy):
    deployment, call = await without_a_replica(deploy, hold_seconds=0.5)
    with pytest.raises(UnavailableError, match=r"^no replica of the deployment is able to serve at the moment$"):
        await deployment.client().generate("x")
    with pytest.raises(ReplicaLostError) as failure:
        await call
    assert str(failure.value) == (
        "deployment 'chat' lost replica 0 on node0 with the request in flight, "
        "and no other could take it within hold_seconds=0.5"
    )
    assert (failure.value.replica, failure.value.host) == (0, "node0")


async def test_what_is_held_ends_with_the_deployment_its_timeout_or_its_caller(deploy, monkeypatch):
    deployment, call = await without_a_replica(deploy)
    client, waits, wait = deployment.client(), [], Router.wait

    async def noted(router):
        waits.append(router)
        await wait(router)

    monkeypatch.setattr(Router, "wait", noted)
    with pytest.raises(RequestTimeoutError):
        await client.generate("x", timeout=0.2)
    waits.clear()
    stream = asyncio.ensure_future(anext(client.stream("x")))
    await until(lambda: waits)
    stream.cancel()
    waits.clear()
    late = asyncio.create_task(client.generate("x"))
    await until(lambda: waits)
    await deployment.stop_balancer()
    for held in (call, late):
        with pytest.raises(DeploymentStoppingError, match=r"^deployment 'chat' has ended \(the test is over\)$"):
            await held


async def test_a_request_that_kills_engines_is_given_up_at_its_second(deploy, held, monkeypatch):
    monkeypatch.setattr(relay, "TRIAL_SECONDS", PATIENCE)
    deployment = await deploy(replica_num=3, echo_delay=0.01)
    submit = EchoEngine.submit

    def dies(engine, request, deliver):
        if request.prompt == "poison":  # of which the engine, whose end takes a moment to be known, makes nothing
            next(rank for rank in deployment.ranks if rank.engine.engine is engine).engine.die()
        else:
            submit(engine, request, deliver)

    client = deployment.client()
    others = [asyncio.create_task(client.generate(WORDS, **LONG)) for _ in range(12)]
    await until(lambda: [stats.running for stats in deployment.stats()] == [4, 4, 4])
    monkeypatch.setattr(EchoEngine, "submit", dies)
    calls = [asyncio.create_task(client.generate(p, **LONG)) for p in (WORDS, "poison", *[WORDS] * 10)]
    with pytest.raises(ReplicaLostError, match="the second in a row before it gave a token: the request may be the re"):
        await calls.pop(1)
    held.set()
    for call in (*others, *calls):
        assert_repeated((await call)[0])
    await until(lambda: deployment.balancer.membership.are_ready)
    assert sum(len(rank.epochs) - 1 for rank in deployment.ranks) == 2
    assert sum(replica.lost for replica in (await client.status()).replicas) == 1


async def test_what_one_request_has_killed_does_not_speak_for_the_next(deploy, monkeypatch):
    monkeypatch.setattr(relay, "RECENT_SECONDS", 3600.0)
    deployment = await deploy(replica_num=1)
    (rank,) = deployment.ranks
    submit = EchoEngine.submit

    def dies(engine, request, deliver):
        if request.prompt == "poison":
            rank.engine.die()
        else:
            submit(engine, request, deliver)

    monkeypatch.setattr(EchoEngine, "submit", dies)
    for deaths in (2, 4):
        with pytest.raises(ReplicaLostError, match="the second in a row"):
            await deployment.client().generate("poison")
        assert len(rank.epochs) in (deaths, deaths + 1)  # the last may be formed again already


async def test_what_another_replica_draws_goes_on_with_what_the_first_has_drawn(deploy, held, monkeypatch):
    """A request without a seed gets one; all it is asked for stays as it is."""
    deployment = await deploy(replica_num=1, echo_delay=0.01)
    seen = []
    submit = EchoEngine.submit

    def noted(engine, request, deliver):
        if request.prompt == WORDS:
            seen.append(request)
        submit(engine, request, deliver)

    monkeypatch.setattr(EchoEngine, "submit", noted)
    call = asyncio.create_task(deployment.client().generate(WORDS, temperature=0.5, stop="x", **LONG))
    await until(lambda: deployment.stats()[0].running)
    deployment.ranks[0].engine.die()
    held.set()
    await call
    first, second = seen
    assert first.params.seed is not None
    assert (first.prompt, first.params) == (second.prompt, second.params)
    assert (first.resume, second.resume != ()) == ((), True)


async def test_what_waited_at_a_lost_replica_goes_on_too(deploy, held, monkeypatch):
    """Nobody can tell whether it was this that killed it, but it is not the second time."""
    monkeypatch.setattr(relay, "TRIAL_SECONDS", 0.05)
    deployment = await deploy(echo_delay=0.01, max_batch_size=1)
    client = deployment.client()
    calls = [asyncio.create_task(client.generate(WORDS, max_new_tokens=20)) for _ in range(8)]
    await until(lambda: [(stats.running, stats.waiting) for stats in deployment.stats()] == [(1, 3)] * 2)
    deployment.ranks[1].engine.die()
    held.set()
    answers = [(await call)[0] for call in calls]
    for answer in answers:
        assert_repeated(answer, 20)
    assert sorted(answer.migrations for answer in answers) == [0] * 4 + [1] * 4


async def test_what_waited_at_two_lost_replicas_is_not_blamed(deploy, monkeypatch):
    """More than one was tried at once, for each had its time; so none of them is the reason."""
    monkeypatch.setattr(relay, "TRIAL_SECONDS", 0.01)
    deployment = await deploy(replica_num=2, echo_delay=0.01, max_batch_size=1)
    first, second = deployment.ranks
    client = deployment.client()
    busy = [asyncio.create_task(client.generate(WORDS, max_new_tokens=10**6)) for _ in range(2)]
    await until(lambda: [stats.running for stats in deployment.stats()] == [1, 1])
    calls = [asyncio.create_task(client.generate(WORDS, max_new_tokens=20)) for _ in range(6)]
    await until(lambda: [stats.waiting for stats in deployment.stats()] == [3, 3])
    second.comes_back = False
    second.engine.die()
    await until(lambda: first.engine.engine.stats().waiting == 7)
    second.comes_back = True
    second.engine.die()
    await until(lambda: deployment.balancer.membership.are_ready)
    first.comes_back = False
    first.engine.die()
    await until(lambda: second.engine.engine.stats().waiting + second.engine.engine.stats().running == 8)
    for call in busy:
        call.cancel()
    for call in calls:
        assert_repeated((await call)[0], 20)
    assert sum(replica.lost for replica in (await client.status()).replicas) == 0
    await asyncio.gather(*busy, return_exceptions=True)


async def test_while_replicas_are_lost_without_it_no_request_is_blamed(deploy, monkeypatch):
    """Here one that is alone, and gets no token from two replicas in a row."""
    monkeypatch.setattr(relay, "RECENT_SECONDS", 3600.0)
    deployment = await deploy(replica_num=1, echo_delay=0.01)
    (rank,) = deployment.ranks
    submit, late = EchoEngine.submit, []

    def submit_late(engine, request, deliver):
        if request.prompt == "late":
            late.append(request)
        if request.prompt != "late" or len(late) == 3:
            submit(engine, request, deliver)

    monkeypatch.setattr(EchoEngine, "submit", submit_late)
    client = deployment.client()
    other = asyncio.create_task(client.generate("other", max_new_tokens=10**6))
    await until(lambda: deployment.stats()[0].running)
    rank.engine.die()
    await until(lambda: len(rank.epochs) == 2 and deployment.balancer.membership.are_ready)
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
    call = asyncio.create_task(client.generate("late"))
    for times in (1, 2):
        await until(lambda times=times: len(late) == times)
        rank.engine.die()
    (answer,) = await call
    assert (str(answer), answer.migrations) == ("late ", 2)


async def test_a_call_without_a_request_is_ended(deploy, monkeypatch):
    """Streams that say nothing cost us and not who opens them."""
    monkeypatch.setattr(relay, "IDLE_SECONDS", 0.05)
    deployment = await deploy(replica_num=1)
    owner = credentials.load_owner(deployment.run)
    async with transport.open_channel(deployment.address, owner) as channel:
        metadata = transport.authorization(owner)
        call = channel.stream_stream(Method.GENERATE)(metadata=metadata, timeout=PATIENCE, wait_for_ready=True)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.read()
    assert str(wire.error_of(failure.value)) == "the call has had no request within 0 s"


async def test_what_a_client_says_goes_on_is_bounded_like_what_is_new(deploy):
    """Only the balancer knows what was admitted before, where it moves a request from a replica that is lost."""
    deployment = await deploy(replica_num=1, max_batch_size=1, queue_bound=1, echo_delay=0.01)
    calls = []
    for load in ((1, 0), (1, 1)):
        calls.append(asyncio.create_task(deployment.client().generate("a", max_new_tokens=10**6)))
        await until(lambda load=load: [(each.running, each.waiting) for each in deployment.stats()] == [load])
    params = pb.GenerateParams(max_new_tokens=9)
    message = pb.GenerateRequest(id="x", prompt="a", params=params, resume=[pb.ResumedAnswer()], admitted=True)
    error = await Handler(deployment).error(message.SerializeToString())
    assert (type(error), str(error)) == (
        QueueFullError,
        "1 requests are waiting, and queue_bound=1 are allowed; try again later",
    )
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_a_connection_has_so_many_streams_at_once_and_the_others_wait(deploy, monkeypatch):
    monkeypatch.setattr(transport, "MAX_STREAMS_PER_CONNECTION", 3)
    deployment = await deploy(replica_num=1, echo_delay=0.001)
    owner = credentials.load_owner(deployment.run)
    params = pb.GenerateParams(max_new_tokens=10**6, stream=True)
    message = pb.NumberedRequest(request=pb.GenerateRequest(id="x", prompt="a", params=params).SerializeToString())
    frame = pb.RequestFrame(requests=[message]).SerializeToString()
    async with transport.open_channel(deployment.address, owner) as channel:
        call = channel.unary_stream(Method.GENERATE)
        calls = [call(frame, metadata=transport.authorization(owner), timeout=PATIENCE) for _ in range(4)]
        reads = {asyncio.create_task(each.read()): each for each in calls}
        await until(lambda: sum(read.done() for read in reads) == 3)
        await deployment.client().generate("x")
        assert deployment.stats()[0].running == 3
        next(each for read, each in reads.items() if read.done()).cancel()
        await until(lambda: all(read.done() for read in reads))
        for each in calls:
            each.cancel()
    await until(deployment.is_idle)


async def test_an_idle_connection_is_closed_but_for_the_balancer_s_own(deploy, monkeypatch):
    monkeypatch.setattr(transport, "IDLE_SECONDS", 0.2)
    deployment = await deploy(replica_num=1)
    client = deployment.client()
    await client.generate("x")
    await until(lambda: not client._connection.is_ready)
    (replica,) = deployment.balancer.router.live
    assert replica._channel.get_state() is grpc.ChannelConnectivity.READY
    assert (await replica.load()).running == 0


async def test_what_grpc_cancels_of_its_own_accord_is_asked_again(deploy, monkeypatch):
    """As its server does with good calls when strangers flood it with resets."""
    generate, cancelled = Relay.generate, []

    async def cancelling(self, requests, context):
        if len(cancelled) < 2:
            cancelled.append(requests)
            await context.abort(grpc.StatusCode.CANCELLED, "")
        async for frame in generate(self, requests, context):
            yield frame

    monkeypatch.setattr(Relay, "generate", cancelling)
    deployment = await deploy(replica_num=1)
    assert str((await deployment.client().generate("x"))[0]) == "x "
    assert len(cancelled) == 2
    assert deployment.ranks[0].epochs == [1]


async def test_a_stream_to_a_replica_that_breaks_alone_costs_no_replica(deploy, held):
    """Every request of it goes on, over another."""
    deployment = await deploy(replica_num=1, echo_delay=0.01)
    client = deployment.client()
    calls = [asyncio.create_task(client.generate(WORDS, **LONG)) for _ in range(5)]
    await until(lambda: deployment.stats()[0].running == 5)
    deployment.balancer.router.live[0]._stream.close()
    held.set()
    for call in calls:
        (answer,) = await call
        assert_repeated(answer)
        assert answer.migrations == 1
    assert deployment.ranks[0].epochs == [1]
    await until(deployment.is_idle)


async def test_the_streams_of_all_replicas_are_one_group(deploy, held, monkeypatch):
    monkeypatch.setattr(frames, "FRAMES_PER_SECOND", 1)
    deployment = await deploy(replica_num=2, echo_delay=0.01)
    client, group = deployment.client(), deployment.balancer._streams
    calls = [asyncio.create_task(client.generate(WORDS, **LONG)) for _ in range(4)]
    await until(lambda: group.pause == 2)
    held.set()
    await asyncio.gather(*calls)
    await until(lambda: group.pause == 0)


async def test_a_stream_is_no_older_than_its_token(deploy, held):
    """What it has asked goes on after a rotation; it may ask no more, and other streams are as they were."""
    deployment = await deploy(replica_num=1, echo_delay=0.01)
    client = deployment.client()
    running = asyncio.create_task(client.generate(WORDS, **LONG))
    await until(lambda: deployment.stats()[0].running)
    stream = client._stream
    await deployment.client().rotate_token()
    with stream.request(b"", lambda chunk: None) as ended, pytest.raises(AuthenticationError):
        await ended
    held.set()
    assert_repeated((await client.generate(WORDS, **LONG))[0])
    assert client._stream is not stream
    assert_repeated((await running)[0])
    assert (await running)[0].migrations == 0


async def test_a_stream_may_have_so_many_requests_open(deploy, held, monkeypatch):
    monkeypatch.setattr(relay, "MAX_REQUESTS", 2)
    deployment = await deploy(replica_num=1, echo_delay=0.01)
    client = deployment.client()
    calls = [asyncio.create_task(client.generate(WORDS, **LONG)) for _ in range(2)]
    await until(lambda: deployment.stats()[0].running == 2)
    with pytest.raises(QueueFullError, match=r"^2 requests of one client are open; try again later$"):
        await client.generate("x")
    assert str((await deployment.client().generate("x"))[0]) == "x "
    held.set()
    for call in calls:
        assert_repeated((await call)[0])
