import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.clients import asynchronous as clients
from mii_hpc.clients.asynchronous import AsyncMIIClient
from mii_hpc.config import MIIConfig
from mii_hpc.errors import (
    AuthenticationError,
    ConfigError,
    DeploymentNotFoundError,
    DeploymentStoppingError,
    InvalidRequestError,
    QueueFullError,
    ReplicaLostError,
    RequestError,
    RequestTimeoutError,
    UnavailableError,
)
from mii_hpc.generation import Chat, Tokenization, joined
from mii_hpc.job.balancer import lifetime
from mii_hpc.job.balancer.connection import ReplicaConnection
from mii_hpc.job.inference import InferenceService
from mii_hpc.rpc import frames
from tests.live import Deployment
from tests.waiting import PATIENCE, until

FOREVER = {"max_new_tokens": 10**6}


def replicas(responses):
    return [response.replica for response in responses]


async def test_requests_take_turns(deploy):
    client = (await deploy(replica_num=3)).client()
    one_at_a_time = [(await client.generate(f"prompt {number}"))[0] for number in range(6)]
    assert replicas(one_at_a_time) == [0, 1, 2, 0, 1, 2]
    in_a_list = await client.generate([f"prompt {number}" for number in range(6)])
    assert replicas(in_a_list) == [0, 1, 2, 0, 1, 2]
    assert [str(response) for response in in_a_list] == [f"prompt {number} " for number in range(6)]
    assert replicas(await client(["a"] * 4)) == [0, 1, 2, 0]
    assert replicas(await client(["a"] * 3)) == [1, 2, 0], "the turn goes on where the last list ended"


async def test_requests_take_turns_whatever_their_size(deploy):
    client = (await deploy()).client()
    prompts = ["x" * (1, 200_000, 10, 3_000)[number % 4] + str(number) for number in range(200)]
    responses = await client.generate(prompts)
    assert replicas(responses) == [0, 1] * 100
    assert [response.generated_text.strip() for response in responses] == prompts


async def test_what_a_response_tells(deploy):
    client = (await deploy()).client()
    (response,) = await client.generate("one two three", max_new_tokens=2, logprobs=True)
    assert (response.generated_text, str(response), repr(response)) == ("one two ",) * 3
    assert (response.prompt_length, response.generated_length, response.finish_reason) == (3, 2, "length")
    assert (response.token_ids, response.logprobs) == ((await client.tokenize("one two")).token_ids, (0.0, 0.0))
    assert (await client.generate("a b", stop="b", return_full_text=True))[0].finish_reason == "stop"


async def test_token_ids_and_conversations_are_prompts_too(deploy):
    client = (await deploy(replica_num=1)).client()
    seen = await client.tokenize("to be")
    assert seen == Tokenization(seen.token_ids, "to be ", (b"to ", b"be "))
    assert [str(answer) for answer in await client([seen.token_ids, "or not"])] == ["to be ", "or not "]
    assert str((await client(list(seen.token_ids)))[0]) == "to be "
    talk = Chat([{"role": "user", "content": "hi"}])
    assert "".join([str(piece) async for piece in client.stream(talk)]) == "user: hi "
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        await client.tokenize("")


async def test_what_is_served(deploy):
    assert (await (await deploy(max_length=77)).client().describe()).max_length == 77


async def test_a_stream_joins_to_the_unary_answer(deploy):
    client = (await deploy(replica_num=1)).client()
    options = {"max_new_tokens": 7, "logprobs": True}
    (whole,) = await client.generate("to be or not", **options)
    pieces = [piece async for piece in client.stream("to be or not", **options)]
    heard = []
    (joined,) = await client.generate("to be or not", heard.extend, **options)
    assert joined == whole
    for stream in (pieces, heard):
        assert "".join(map(str, stream)) == whole.generated_text
        assert sum((piece.token_ids for piece in stream), ()) == whole.token_ids
        assert [piece.finish_reason for piece in stream][-1] == whole.finish_reason
        assert {piece.finish_reason for piece in stream[:-1]} <= {"none"}
        assert stream[-1].generated_length == whole.generated_length


async def test_pieces_come_as_they_are_made(deploy):
    client = (await deploy(replica_num=1, echo_delay=0.01)).client()
    async with contextlib.aclosing(client.stream("a b c d", **FOREVER)) as pieces:
        assert str(await anext(pieces)).startswith("a ")
        assert (await anext(pieces)).finish_reason == "none"


async def test_several_answers_to_one_prompt(deploy):
    client = (await deploy()).client()
    responses = await client.generate(["a b", "c"], num_return_sequences=2)
    assert [(str(r), r.index, r.replica) for r in responses] == [
        ("a b ", 0, 0),
        ("a b ", 1, 0),
        ("c ", 0, 1),
        ("c ", 1, 1),
    ]
    pieces = [piece async for piece in client.stream("a b", num_return_sequences=2)]
    assert "".join(str(piece) for piece in pieces if piece.index == 1) == "a b "


async def test_a_bad_prompt_fails_alone_and_last(deploy):
    deployment = await deploy(echo_delay=0.02)
    with pytest.raises(InvalidRequestError, match=r"^the prompt is empty$") as failure:
        await deployment.client().generate(["good", "", "a b c d e f g h"])
    good, bad, slow = failure.value.responses
    assert [str(response) for response in (*good, *slow)] == ["good ", "a b c d e f g h "]
    assert bad is failure.value
    assert deployment.is_idle()


async def test_wrong_options_are_refused_before_anything_is_sent(tmp_path):
    client = AsyncMIIClient(MIIConfig(deployment_name="absent", home=tmp_path))
    for call in (
        client.generate("x", top_p=7),
        client.generate("x", max_tokens=7),
        client.generate(["x", 7]),
        client.generate({"query": ["x"]}),
        anext(client.stream(7)),
        client.generate(["x", "y"], print),
        anext(client.stream("x", top_k=0)),
        client.generate("bad\ud800"),
    ):
        with pytest.raises(InvalidRequestError):
            await call


async def test_a_client_needs_a_name():
    with pytest.raises(ConfigError, match=r"^deployment_name='': "):
        AsyncMIIClient(MIIConfig())


@pytest.mark.parametrize("prompts", ["one", ["one", "two", "three"]], ids=["one", "several"])
async def test_a_timeout_ends_the_requests_everywhere(deploy, prompts):
    deployment = await deploy(echo_delay=0.01)
    with pytest.raises(RequestTimeoutError) as failure:
        await deployment.client().generate(prompts, timeout=0.2, **FOREVER)
    assert failure.value.deployment_name == "chat"
    await until(deployment.is_idle)


async def test_a_stream_has_a_timeout_too(deploy):
    deployment = await deploy(replica_num=1, echo_delay=0.01)
    pieces = []
    for timeout in (0.3, 3, 30):  # the first piece may be slow to come
        with pytest.raises(RequestTimeoutError) as failure:
            async for piece in deployment.client().stream("one two", timeout=timeout, **FOREVER):
                pieces.append(piece)
        if pieces:
            break
    assert pieces
    assert (failure.value.deployment_name, failure.value.replica) == ("chat", 0)
    await until(deployment.is_idle)


async def test_leaving_a_stream_cancels_it_everywhere(deploy):
    deployment = await deploy(echo_delay=0.01)
    stream = deployment.client().stream("one", **FOREVER)
    await anext(stream)
    assert sum(stats.running for stats in deployment.stats()) == 1
    await stream.aclose()
    await until(deployment.is_idle)


async def test_a_cancelled_call_ends_its_requests_everywhere(deploy):
    deployment = await deploy(echo_delay=0.01)
    call = asyncio.create_task(deployment.client().generate(["a", "b", "c", "d"], **FOREVER))
    await until(lambda: [stats.running for stats in deployment.stats()] == [2, 2])
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(deployment.is_idle)


async def test_a_failing_streaming_fn_ends_the_request(deploy):
    deployment = await deploy(echo_delay=0.01)

    def fail(_responses):
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        await deployment.client().generate("one", fail, **FOREVER)
    await until(deployment.is_idle)


@pytest.mark.parametrize("notice", ["connection", "report"])
async def test_a_replica_lost_in_mid_stream(deploy, held, notice):
    deployment = await deploy(tensor_parallel=2, echo_delay=0.01, migration_limit=0)
    client = deployment.client()
    calls = [asyncio.create_task(client.generate(f"{n} b", max_new_tokens=60)) for n in range(4)]
    await until(lambda: [stats.running for stats in deployment.stats()] == [2, 2])
    leader, follower = deployment.ranks[2:]
    engine = leader.engine
    if notice == "connection":
        await engine.break_connections()
    engine.die()
    held.set()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    lost = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert [type(error) for error in lost] == [ReplicaLostError] * 2
    assert {str(error) for error in lost} == {
        "deployment 'chat' lost replica 1 on node2 with the request in flight, "
        "and migration_limit=0 lets it move no more"
    }
    assert {(error.deployment_name, error.replica, error.host) for error in lost} == {("chat", 1, "node2")}
    assert [response.generated_length for (response,) in (o for o in outcomes if o not in lost)] == [60, 60]
    await until(lambda: deployment.balancer.membership.replicas[1].state == "ready")
    assert leader.epochs == follower.epochs == [1, 2]
    assert deployment.ranks[0].epochs == [1]
    assert sorted(replicas(await client.generate(["a", "b"]))) == [0, 1]


async def test_a_replica_lost_between_requests_is_not_asked(deploy):
    deployment = await deploy(replica_num=3)
    client = deployment.client()
    deployment.ranks[1].comes_back = False
    deployment.ranks[1].engine.die()
    await until(lambda: len(deployment.balancer.router.live) == 2)
    assert replicas(await client.generate(["a"] * 4)) == [0, 2, 0, 2]


async def test_without_a_live_replica(deploy):
    deployment = await deploy(hold_seconds=0)
    for rank in deployment.ranks:
        rank.comes_back = False
        rank.engine.die()
    await until(lambda: not deployment.balancer.router.live)
    with pytest.raises(UnavailableError, match=r"^no replica of the deployment is able to serve") as failure:
        await deployment.client().generate("x")
    assert (failure.value.deployment_name, failure.value.replica) == ("chat", None)


async def test_a_stream_cut_short_is_an_error(deploy, monkeypatch):
    async def cut(self, asked):
        asked.send(0, pb.GenerateChunk(text=["The answer is not"], generated_length=4).SerializeToString())

    monkeypatch.setattr(InferenceService, "_answer", cut)
    client = (await deploy()).client()
    with pytest.raises(RequestError, match="cut short") as failure:
        await client.generate("x")
    assert (failure.value.deployment_name, failure.value.replica) == ("chat", 0)
    with pytest.raises(RequestError, match="cut short"):
        [piece async for piece in client.stream("x")]


async def test_a_full_queue(deploy):
    deployment = await deploy(replica_num=1, max_batch_size=1, queue_bound=2, echo_delay=0.01)
    with pytest.raises(QueueFullError, match="2 requests are waiting") as failure:
        await deployment.client().generate(["a"] * 6, max_new_tokens=40)
    assert failure.value.retryable
    # As many as may wait are admitted, and one more if the engine has taken one up before the last of them comes.
    assert 2 <= sum(isinstance(outcome, list) for outcome in failure.value.responses) < 6


async def test_status(deploy):
    deployment = await deploy(echo_delay=0.01)
    client = deployment.client()
    await client.generate(["a", "b", "c"])
    stream = client.stream("x", **FOREVER)
    await anext(stream)
    status = await client.status()
    await stream.aclose()
    assert (status.deployment_name, status.state, status.job_id) == ("chat", "ready", str(deployment.job.pid))
    assert [(r.state, r.host, r.epoch, r.served, r.in_flight) for r in status.replicas] == [
        ("ready", "node0", 1, 2, 0),
        ("ready", "node1", 1, 2, 1),
    ]


async def test_terminate_lets_running_requests_finish(deploy, held, monkeypatch):
    monkeypatch.setattr(lifetime, "DRAIN_SECONDS", PATIENCE)
    deployment = await deploy(echo_delay=0.01)
    client, other = deployment.client(), deployment.client()
    running = asyncio.create_task(client.generate("a b c", max_new_tokens=30))
    await until(lambda: not deployment.is_idle())
    ending = asyncio.create_task(other.terminate_server())
    await until(lambda: deployment.state() == "stopping")
    with pytest.raises(DeploymentStoppingError, match=r"^deployment 'chat' is ending \(a client asked for it\)$"):
        await client.generate("too late")
    held.set()
    assert (await running)[0].generated_length == 30
    await ending
    assert deployment.registry.get("chat") is None
    await until(lambda: [rank.left for rank in deployment.ranks] == ["", ""])


async def test_terminate_does_not_wait_for_long_requests(deploy, monkeypatch):
    monkeypatch.setattr(lifetime, "DRAIN_SECONDS", 0.1)
    deployment = await deploy(echo_delay=0.01)
    client = deployment.client()
    running = asyncio.create_task(client.generate("a", **FOREVER))
    await until(lambda: not deployment.is_idle())
    await client.terminate_server()
    with pytest.raises((DeploymentStoppingError, UnavailableError)):
        await running


async def test_after_the_end(deploy):
    deployment = await deploy()
    client = deployment.client()
    await client.generate("x")
    await deployment.client().terminate_server()
    await deployment.balancer.server.stop(None)
    with contextlib.suppress(
        UnavailableError, DeploymentNotFoundError
    ):  # when the end of the connection is noticed only by the call
        await client.generate("x")
    with pytest.raises(DeploymentNotFoundError, match="'chat' is not in the registry") as failure:
        await client.generate("x")
    assert failure.value.deployment_name == "chat"
    with pytest.raises(DeploymentNotFoundError):
        await client.terminate_server()


async def test_a_client_follows_its_deployment_to_another_address(deploy):
    first = await deploy()
    async with AsyncMIIClient(first.config) as client:
        await client.generate("x")
        await first.stop()
        second = await deploy()
        assert second.address != first.address
        with contextlib.suppress(UnavailableError):
            await client.generate("x")
        await client.generate("x")


async def test_before_the_balancer_listens(tmp_path):
    deployment = Deployment(tmp_path)
    client = deployment.client()
    with pytest.raises(UnavailableError, match=r"^deployment .* yet: its job is pending$") as failure:
        await client.generate("x")
    assert failure.value.deployment_name == "chat"
    assert (await client.status()).state == "pending"
    deployment.end_job()


async def test_nobody_at_the_address(deploy, monkeypatch):
    monkeypatch.setattr(clients, "CONNECT_SECONDS", (0.3,))
    deployment = await deploy()
    await deployment.balancer.server.stop(None)
    with pytest.raises(UnavailableError, match=f"does not answer at {deployment.address} ") as failure:
        await deployment.client().generate("x")
    assert failure.value.deployment_name == "chat"


async def test_a_token_that_is_not_good(deploy):
    deployment = await deploy()
    deployment.run.owner_token.write_text("another")
    with pytest.raises(AuthenticationError) as failure:
        await deployment.client().generate("x")
    assert failure.value.deployment_name == "chat"


async def test_through_a_tunnel(deploy):
    deployment = await deploy()
    port = int(deployment.address.rpartition(":")[2])
    deployment.registry.publish(deployment.registry.get("chat").model_copy(update={"address": "192.0.2.1:1"}))
    config = deployment.config.model_copy(update={"port_number": port})
    async with AsyncMIIClient(config, "127.0.0.1") as client:
        assert str((await client.generate("hello"))[0]) == "hello "


class Squeue:
    """Counts how often the scheduler is asked, and answers as the test says."""

    def __init__(self, monkeypatch, live):
        self.live, self.asked = live, 0
        monkeypatch.setattr(clients.schedulers, "is_live", self)

    def __call__(self, _entry, _is_own=True):
        self.asked += 1
        return self.live


async def gone(deployment):
    """Kill a deployment, as a power cut does: its entry stays."""
    await deployment.balancer.server.stop(None)
    deployment.balancer.lifetime._ended = True


@pytest.mark.parametrize(("live", "state"), [(False, "ended"), (True, "unresponsive")])
async def test_the_status_of_a_deployment_that_does_not_answer(deploy, monkeypatch, live, state):
    monkeypatch.setattr(clients, "CONNECT_SECONDS", (0.1,))
    deployment = await deploy()
    await gone(deployment)
    Squeue(monkeypatch, live)
    status = await deployment.client().status()
    assert (status.state, status.host, status.replicas) == (state, "node0", ())


@pytest.mark.parametrize("live", [False, True], ids=["dead", "silent"])
async def test_many_calls_to_a_dead_deployment_learn_it_together(deploy, monkeypatch, live):
    """Each has its error after one wait, and a list has one for each prompt; the scheduler is asked sparingly."""
    monkeypatch.setattr(clients, "CONNECT_SECONDS", (0.1,) * 4)
    monkeypatch.setattr(clients, "REMEMBERED_SECONDS", PATIENCE)
    deployment = await deploy()
    await gone(deployment)
    squeue = Squeue(monkeypatch, live)
    client = deployment.client()
    calls = [client.generate("x") for _ in range(64)]
    calls += [client.generate(["x"] * 600), anext(client.stream("x"))]
    errors = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), PATIENCE)
    kind = UnavailableError if live else DeploymentNotFoundError
    assert {type(error) for error in errors} == {kind}
    assert [type(error) for error in errors[64].responses] == [kind] * 600
    assert errors[0].responses == []
    assert squeue.asked == (2 if live else 1)


async def test_a_timeout_covers_finding_and_connecting(deploy, monkeypatch):
    monkeypatch.setattr(clients, "CONNECT_SECONDS", (PATIENCE * 9,))
    deployment = await deploy()
    await gone(deployment)
    client = deployment.client()
    for call in (
        client.generate("x", timeout=0.05),
        client.generate(["x", "y"], timeout=0.05),
        client.generate("x", lambda _: None, timeout=0.05),
        anext(client.stream("x", timeout=0.05)),
    ):
        with pytest.raises(RequestTimeoutError, match=r"^timeout=0.05: "):
            await asyncio.wait_for(call, PATIENCE)


async def test_what_was_answered_before_the_timeout_is_told(deploy):
    client = (await deploy(echo_delay=0.01)).client()
    for timeout in (1, 10):  # the first answer may be slow to come
        with pytest.raises(RequestTimeoutError) as failure:
            await client.generate(["a", "b " * 10**5], timeout=timeout)
        answered = failure.value.responses[0]
        if isinstance(answered, list):
            break
    assert str(answered[0]) == "a "


async def test_a_timeout_of_streaming_fn_is_its_own(deploy):
    def fail(_responses):
        raise TimeoutError("the caller's own")

    client = (await deploy()).client()
    with pytest.raises(TimeoutError, match="the caller's own"):
        await client.generate("one", fail, timeout=PATIENCE)


async def test_the_scheduler_is_asked_sparingly_while_a_deployment_ends(deploy, monkeypatch):
    deployment = await deploy(echo_delay=0.01)
    monkeypatch.setattr(lifetime, "DRAIN_SECONDS", 1.0)
    monkeypatch.setattr(clients, "SCHEDULER_SECONDS", PATIENCE)
    running = asyncio.create_task(deployment.client().generate("a", **FOREVER))
    await until(lambda: not deployment.is_idle())
    squeue = Squeue(monkeypatch, True)
    await deployment.client().terminate_server()
    assert squeue.asked <= 1
    await asyncio.wait({running})


async def test_status_says_degraded_and_ended(deploy, monkeypatch):
    monkeypatch.setattr(clients, "CONNECT_SECONDS", (0.1,))
    deployment = await deploy()
    client = deployment.client()
    deployment.ranks[1].comes_back = False
    deployment.ranks[1].engine.die()
    await until(lambda: deployment.state() == "degraded")
    assert (await client.status()).state == "degraded"
    await gone(deployment)
    Squeue(monkeypatch, False)
    with contextlib.suppress(UnavailableError):  # where the end of the connection is noticed only by the call
        await client.status()
    assert (await client.status()).state == "ended"


async def test_a_job_that_died_before_it_served_has_ended(tmp_path, monkeypatch):
    deployment = Deployment(tmp_path)
    client = deployment.client()
    Squeue(monkeypatch, False)
    with pytest.raises(DeploymentNotFoundError, match="has ended: its job"):
        await client.generate("x")
    assert (await client.status()).state == "ended"
    deployment.end_job()


WORDS = "to be or not that is the question"


def assert_repeated(response, length):
    """It is the echo engine's whole answer, with no token lost or doubled."""
    assert response.generated_text == "".join(f"{WORDS.split()[number % 8]} " for number in range(length))
    assert (len(response.token_ids), response.generated_length, response.finish_reason) == (length, length, "length")


async def test_a_request_that_goes_on_waits_for_room_in_the_queue(deploy, held, monkeypatch):
    """Where all who lost the balancer come back at once."""
    deployment = await deploy(replica_num=1, echo_delay=0.02)
    call = asyncio.create_task(deployment.client().generate(WORDS, max_new_tokens=50))
    await until(lambda: not deployment.is_idle())
    engine, refused = deployment.ranks[0].engine.engine, []
    submit = engine.submit

    def full(request, deliver):
        if request.resume and len(refused) < 2:
            refused.append(request)
            raise QueueFullError("1024 requests are waiting; try again later")
        submit(request, deliver)

    monkeypatch.setattr(engine, "submit", full)
    await deployment.kill_balancer()
    await until(deployment.is_idle)
    await deployment.replace_balancer()
    held.set()
    assert_repeated((await call)[0], 50)
    assert len(refused) == 2


async def test_requests_go_on_at_another_balancer(deploy, held, monkeypatch):
    deployment = await deploy(echo_delay=0.01)
    client = deployment.client()
    stream = client.stream(WORDS, max_new_tokens=100, num_return_sequences=2)
    pieces = [await anext(stream), await anext(stream)]
    calls = [asyncio.create_task(client.generate(WORDS, max_new_tokens=100)) for _ in range(2)]
    several = asyncio.create_task(client.generate(["one", "two", WORDS], max_new_tokens=100))
    await until(lambda: [stats.running for stats in deployment.stats()] == [3, 3])
    asking = asyncio.Event()
    ask = ReplicaConnection.ask

    async def slowly(*arguments):
        if not asking.is_set():
            asking.set()
            await asyncio.sleep(PATIENCE)
        return await ask(*arguments)

    monkeypatch.setattr(ReplicaConnection, "ask", slowly)
    tokenising = asyncio.create_task(client.tokenize("to be"))
    await asking.wait()
    await deployment.kill_balancer()
    await until(deployment.is_idle)
    late = asyncio.create_task(client.generate("late"))
    await deployment.replace_balancer()
    held.set()
    pieces += [piece async for piece in stream]
    answers = [*joined(pieces), *[(await call)[0] for call in calls], (await several)[2]]
    for answer in answers:
        assert_repeated(answer, 100)
    assert [answer.migrations for answer in answers] == [1] * 5
    status = await client.status()
    assert sum(each.resumed for each in status.replicas) >= 5
    assert [(each.migrations, each.lost) for each in status.replicas] == [(0, 0)] * 2
    assert str((await late)[0]) == "late "
    assert (await tokenising).text == "to be "
    assert [rank.epochs for rank in deployment.ranks] == [[1], [1]]


async def test_without_retry_a_lost_balancer_is_an_error(deploy):
    deployment = await deploy(echo_delay=0.01)
    stream = deployment.client().stream("a", retry=None, **FOREVER)
    await anext(stream)
    await deployment.kill_balancer()
    with pytest.raises(UnavailableError, match=r"^deployment 'chat' does not answer: "):
        async for _ in stream:
            pass
    with pytest.raises(InvalidRequestError, match=r"^retry='always': must be 'resume' or None$"):
        await deployment.client().generate("x", retry="always")


async def test_a_silent_balancer_is_a_lost_one(deploy, held, monkeypatch):
    """A request goes on elsewhere, over a new connection; without retry it fails."""
    deployment = await deploy(echo_delay=0.01)
    falls_silent = asyncio.Event()
    pulse = SimpleNamespace(beat=lambda: None, lost=falls_silent.wait)
    monkeypatch.setattr(frames, "Pulse", lambda: pulse)
    first, second = deployment.client(), deployment.client()
    answer = asyncio.create_task(first.generate(WORDS, max_new_tokens=100))
    told = asyncio.create_task(second.generate(WORDS, max_new_tokens=100, retry=None))
    await until(lambda: [stats.running for stats in deployment.stats()] == [1, 1])
    before = first._connection
    falls_silent.set()
    with pytest.raises(UnavailableError, match=r"^deployment 'chat' gives no sign of life$"):
        await told
    falls_silent.clear()
    held.set()
    assert_repeated((await answer)[0], 100)
    assert (await answer)[0].migrations >= 1
    assert first._connection not in (None, before)


async def test_a_request_waits_for_a_lost_balancer_no_longer_than_its_timeout_or_its_job(deploy, monkeypatch):
    monkeypatch.setattr(clients, "CONNECT_SECONDS", (0.1,))
    deployment = await deploy(echo_delay=0.01)
    client, other = deployment.client(), deployment.client()
    await client.generate("x"), await other.generate("x")  # so that the timeout is not spent on connecting
    hasty = asyncio.create_task(client.generate("a", timeout=2, **FOREVER))
    patient = asyncio.create_task(other.generate("a", **FOREVER))
    await until(lambda: [stats.running for stats in deployment.stats()] == [1, 1])
    await gone(deployment)
    squeue = Squeue(monkeypatch, True)
    with pytest.raises(RequestTimeoutError):
        await hasty
    assert not patient.done()
    squeue.live = False
    with pytest.raises(UnavailableError, match=r"^deployment 'chat' has ended$"):
        await patient


async def test_a_balancer_that_stays_away_is_given_up(deploy, monkeypatch):
    monkeypatch.setattr(clients, "CONNECT_SECONDS", (0.1,))
    monkeypatch.setattr(clients, "RESUME_SECONDS", 0.5)
    deployment = await deploy(echo_delay=0.01)
    call = asyncio.create_task(deployment.client().generate("a", **FOREVER))
    await until(lambda: not deployment.is_idle())
    await gone(deployment)
    with pytest.raises(UnavailableError, match=r"^deployment 'chat' does not answer at "):
        await call
