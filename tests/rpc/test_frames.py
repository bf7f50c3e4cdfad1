import asyncio
import contextlib
import itertools
from types import SimpleNamespace

import pytest

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.errors import InvalidRequestError, QueueFullError, RequestError
from mii_hpc.rpc import frames, liveness, wire
from mii_hpc.rpc.frames import ClosedError, LostError, RequestStream
from tests.waiting import PATIENCE, until


class Call:
    """A stream between the two sides without gRPC in between."""

    def __init__(self, sent, answer, **bounds):
        self.serving = frames.serve(sent, answer, **bounds)
        self.has_room = asyncio.Event()
        self.has_room.set()
        self.frames, self.beats = [], 0
        self.has_ended = False
        """Whether the server has ended it, and the caller knows."""
        self._task = None

    async def __aiter__(self):
        self._task = asyncio.current_task()
        async with contextlib.aclosing(self.serving) as serving:
            async for frame in serving:
                if frame:
                    self.frames.append(pb.AnswerFrame.FromString(frame))
                else:
                    self.beats += 1
                yield frame
                await self.has_room.wait()
        self.has_ended = True

    def cancel(self):
        if self._task not in (None, asyncio.current_task()):
            self._task.cancel()

    def pieces(self):
        return [[(piece.number, piece.chunk) for piece in frame.pieces if piece.chunk] for frame in self.frames]


class Server:
    """Answers requests as the test says; `asked` are those it has in hand, by their payload."""

    def __init__(self, **bounds):
        self.asked, self.cancelled, self.began, self.calls = {}, [], [], []
        self._bounds = bounds

    async def answer(self, request):
        self.began.append(request.payload)
        ended = asyncio.get_running_loop().create_future()
        self.asked[request.payload] = request, ended
        try:
            await ended
        except asyncio.CancelledError:
            self.cancelled.append(request.payload)
            raise

    def send(self, payload, chunk, index=0):
        self.asked[payload][0].send(index, chunk)

    def end(self, payload, error=None):
        _, ended = self.asked.pop(payload)
        ended.set_exception(error) if error else ended.set_result(None)

    def stream(self, **options):
        def method(sent, metadata):
            self.calls.append(Call(sent, self.answer, **self._bounds))
            return self.calls[-1]

        return RequestStream(method, (), **options)


class Caller:
    """One request on a stream, and what has come of it."""

    def __init__(self, stream, payload, **options):
        self.chunks = []
        self._context = stream.request(payload, self.chunks.append, **options)
        self.ended = self._context.__enter__()

    def leave(self):
        self._context.__exit__(None, None, None)


async def asked(server, stream, *payloads):
    callers = [Caller(stream, payload) for payload in payloads]
    await until(lambda: set(payloads) <= server.asked.keys())
    return callers


async def test_what_is_said_at_once_travels_in_one_frame():
    server = Server()
    stream = server.stream()
    callers = await asked(server, stream, b"a", b"b", b"c")
    assert server.began == [b"a", b"b", b"c"]
    for step in (b"1", b"2"):
        for payload in (b"a", b"b", b"c"):
            server.send(payload, step)
        await until(lambda: callers[2].chunks[-1:] == [step])  # noqa: B023
    assert server.calls[0].pieces() == [[(0, step), (1, step), (2, step)] for step in (b"1", b"2")]
    for payload in (b"a", b"b", b"c"):
        server.end(payload)
    for caller in callers:
        await caller.ended
        assert caller.chunks == [b"1", b"2"]
    assert len(server.calls[0].frames) == 3
    assert len(stream) == 0


async def test_a_slow_reader_bounds_only_itself(monkeypatch):
    """Answer by answer, what waits for it is joined, up to the size of a frame."""
    monkeypatch.setattr(frames, "FRAME_BYTES", 1000)
    server = Server()
    slow, quick = server.stream(), server.stream()
    (first,) = await asked(server, slow, b"slow")
    second = Caller(quick, b"quick")
    await until(lambda: len(server.asked) == 2)
    server.calls[0].has_room.clear()
    server.send(b"slow", b"!")
    await until(lambda: first.chunks == [b"!"])
    for step in range(50):
        for index in (0, 1):
            server.send(b"slow", b"%d" % index * 100, index)
        server.send(b"quick", b"q")
        await until(lambda: len(second.chunks) == step + 1)  # noqa: B023
    server.end(b"slow")
    server.end(b"quick")
    await second.ended
    assert first.chunks == [b"!"] and not first.ended.done()
    server.calls[0].has_room.set()
    await first.ended
    assert sorted(first.chunks[1:]) == [b"0" * 1000] * 5 + [b"1" * 1000] * 5
    assert all(sum(len(chunk) for _, chunk in frame) <= 1000 for frame in server.calls[0].pieces())


def test_streams_are_crowded_while_more_frames_come_than_can_be_followed():
    group, now = frames.StreamGroup(), 1000.0

    def after_a_second_of(count):
        nonlocal now
        for _ in range(count):
            now += 1 / count
            group.count(now)
        return group.is_crowded

    rates = (0.1, 0.9, 1.2, 0.9, 0.6, 0.4, 0.9)
    crowded = [after_a_second_of(round(rate * frames.FRAMES_PER_SECOND)) for rate in rates]
    assert crowded == [False, False, True, True, True, False, False]


async def test_where_a_process_cannot_follow_its_streams_their_servers_pause(monkeypatch):
    """It could not follow otherwise: each has a frame for every step of its own engine."""
    monkeypatch.setattr(frames, "FRAMES_PER_SECOND", 6)
    monkeypatch.setattr(frames, "LEAST_PAUSE", 0.2)
    monkeypatch.setattr(frames.StreamGroup, "count", lambda self, now: None)
    server, group = Server(), frames.StreamGroup()
    group.is_crowded = True
    streams = [server.stream(group=group) for _ in range(3)]
    (alone,) = await asked(server, streams[0], b"0")
    assert group.pause == 0
    server.send(b"0", b"!")
    await until(lambda: alone.chunks == [b"!"])
    others = [Caller(stream, payload) for stream, payload in zip(streams[1:], (b"1", b"2"), strict=True)]
    await until(lambda: len(server.asked) == 3)
    assert group.pause == 0.5
    server.send(b"0", b"!")  # with which its server is told what has changed
    await until(lambda: alone.chunks == [b"!", b"!"] and streams[0]._outbox._told == 0.5)
    before = [len(call.frames) for call in server.calls]
    for _ in range(50):
        for payload in (b"0", b"1", b"2"):
            server.send(payload, b".")
        for _ in range(10):
            await asyncio.sleep(0)
    for payload in (b"1", b"2"):
        server.end(payload)
    for caller in others:
        await caller.ended
        assert b"".join(caller.chunks) == b"." * 50
        caller.leave()
    await until(lambda: b"".join(alone.chunks) == b"!!" + b"." * 50)
    assert all(len(call.frames) < count + 25 for call, count in zip(server.calls, before, strict=True))
    assert group.pause == 0
    server.send(b"0", b"!")
    await until(lambda: streams[0]._outbox._told == 0)
    alone.leave()


@pytest.mark.parametrize("pause", [-1.0, float("nan"), float("inf"), 1e9])
async def test_what_is_no_pause_is_none(pause):
    pieces = []

    async def sent():
        yield pb.RequestFrame(requests=[pb.NumberedRequest(number=1)], pause=pause).SerializeToString()

    async def twice(request):
        for step in (b"1", b"2"):
            request.send(0, step)
            await until(lambda: pieces and pieces[-1].chunk == step)  # noqa: B023

    async for frame in frames.serve(sent(), twice):
        pieces += pb.AnswerFrame.FromString(frame).pieces
    assert [piece.chunk for piece in pieces] == [b"1", b"2", b""]


async def test_a_request_that_is_left_is_cancelled_and_no_other():
    server = Server()
    stream = server.stream()
    first, second = await asked(server, stream, b"a", b"b")
    first.leave()
    await until(lambda: server.cancelled == [b"a"])
    server.send(b"a", b"too late")
    server.send(b"b", b"1")
    server.end(b"b")
    await second.ended
    assert (first.chunks, second.chunks) == ([], [b"1"])
    Caller(stream, b"never").leave()  # before it was sent
    (third,) = await asked(server, stream, b"c")
    assert server.began == [b"a", b"b", b"c"]
    third.leave()


async def test_a_request_fails_alone():
    server = Server()
    stream = server.stream()
    wrong, broken, good, foiled = await asked(server, stream, b"wrong", b"broken", b"good", b"foiled")
    server.end(b"wrong", InvalidRequestError("top_p=7", replica=3, host="node3"))
    server.end(b"broken", ZeroDivisionError("a bug"))
    server.asked[b"foiled"][0].fail(QueueFullError("enough"))
    with pytest.raises(InvalidRequestError, match=r"^top_p=7$") as failure:
        await wrong.ended
    assert (failure.value.replica, failure.value.host) == (3, "node3")
    with pytest.raises(RequestError, match="the request has failed: ZeroDivisionError: a bug"):
        await broken.ended
    with pytest.raises(QueueFullError, match="enough"):
        await foiled.ended
    await until(lambda: server.cancelled == [b"foiled"])
    server.end(b"good")
    await good.ended


async def test_what_a_caller_cannot_take_concerns_that_request_alone():
    server = Server()
    stream = server.stream()

    def refuse(_chunk):
        raise ZeroDivisionError("a bug")

    (good,) = await asked(server, stream, b"good")
    with stream.request(b"bad", refuse) as ended:
        await until(lambda: b"bad" in server.asked)
        server.send(b"bad", b"1")
        with pytest.raises(RequestError, match="ZeroDivisionError"):
            await ended
    await until(lambda: server.cancelled == [b"bad"])
    server.end(b"good")
    await good.ended


@pytest.mark.parametrize("side", ["caller", "server"])
async def test_the_end_of_a_stream_ends_every_request_of_it(side):
    server = Server()
    stream = server.stream()
    callers = await asked(server, stream, b"a", b"b")
    if side == "caller":
        stream.close()
    else:
        server.calls[0].cancel()
    for caller in callers:
        with pytest.raises(LostError):
            await caller.ended
    await until(lambda: sorted(server.cancelled) == [b"a", b"b"])
    with pytest.raises(LostError), stream.request(b"late", print):
        pass


@pytest.mark.parametrize("patience", [PATIENCE, 0])
async def test_a_caller_finishes_once_the_server_has_ended_the_stream_or_hardly_will(monkeypatch, patience):
    monkeypatch.setattr(frames, "FINISH_SECONDS", patience)
    server = Server()
    stream = server.stream()
    (caller,) = await asked(server, stream, b"a")
    await stream.finish()
    assert server.calls[0].has_ended == bool(patience), "nothing of the call is to come"
    with pytest.raises(ClosedError):
        await caller.ended
    await until(lambda: server.cancelled == [b"a"])
    with pytest.raises(LostError):
        Caller(stream, b"b")


async def test_an_idle_stream_is_closed_by_its_caller():
    server = Server()
    stream = server.stream(idle_seconds=0.05)
    first, second = await asked(server, stream, b"a", b"b")
    server.end(b"a")
    server.end(b"b")
    for caller in (first, second):
        await caller.ended
    for caller in (first, second):
        caller.leave()
    third = Caller(stream, b"c")
    await asyncio.sleep(0.2)
    assert not stream.has_ended
    third.leave()
    await until(lambda: stream.has_ended)
    with pytest.raises(LostError), stream.request(b"late", print):
        pass


async def test_a_server_with_nothing_to_say_gives_signs_of_life(monkeypatch):
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(liveness, "SILENT_SECONDS", PATIENCE)
    server = Server()
    stream = server.stream()
    (caller,) = await asked(server, stream, b"a")
    await until(lambda: server.calls[0].beats > 3)
    server.send(b"a", b"1")
    server.end(b"a")
    await caller.ended
    assert caller.chunks == [b"1"]
    stream.close()


async def test_a_silent_server_is_a_lost_one(monkeypatch):
    monkeypatch.setattr(liveness, "SILENT_SECONDS", 0.1)
    server = Server()
    stream = server.stream()
    caller = Caller(stream, b"a")
    with pytest.raises(LostError) as lost:
        await asyncio.wait_for(caller.ended, PATIENCE)
    assert (lost.value.is_silent, lost.value.is_of_connection) == (True, True)
    assert stream.has_ended


async def served(*sent, bounds=None, then=None):
    """Return the pieces that a server without patience sends for some frames, and its error."""
    server = Server(**(bounds or {}))

    async def send():
        for frame in sent:
            yield frame
        if then is not None:
            await then.wait()

    pieces = []
    try:
        async for frame in frames.serve(send(), server.answer, **(bounds or {})):
            pieces += pb.AnswerFrame.FromString(frame).pieces
    except InvalidRequestError as error:
        return pieces, str(error), server
    return pieces, "", server


def requests(*numbers):
    return pb.RequestFrame(requests=[pb.NumberedRequest(number=n) for n in numbers]).SerializeToString()


async def test_what_is_no_frame_ends_the_stream():
    _, error, _ = await served(requests(1), b"\xff\xff")
    assert "not a valid RequestFrame message" in error
    _, error, _ = await served(requests(1, 1))
    assert error == "number=1: a request of the stream that has not ended has it"
    _, error, _ = await served()
    assert error == "the call has ended without a request"


async def test_a_stream_without_a_request_is_ended():
    forever = asyncio.Event()
    _, error, _ = await asyncio.wait_for(served(bounds={"idle_seconds": 0.05}, then=forever), PATIENCE)
    assert error == "the call has had no request within 0 s"


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_timeout_is_none(timeout):
    """Not a number would put the event loop's timers out of order."""
    assert frames.ServedRequest(pb.NumberedRequest(timeout=timeout), None).timeout is None
    assert frames.ServedRequest(pb.NumberedRequest(timeout=2.5), None).timeout == 2.5


async def test_above_its_limit_requests_are_refused():
    pieces, _, _ = await served(requests(1, 2, 3), b"\xff", bounds={"limit": 2})
    assert [piece.number for piece in pieces] == [3]
    assert type(wire.unpack_failure(pieces[0].failure)) is QueueFullError


@pytest.mark.parametrize(("field", "entry"), [("requests", b"\x0a\0"), ("cancelled", b"\x10\1"), ("packed", b"\1")])
async def test_a_frame_of_too_many_requests_is_refused_unparsed(monkeypatch, field, entry):
    """It would keep a server busy for minutes, and take its memory, however few bytes it has."""
    frame = entry * 2**21
    if field == "packed":
        frame = pb.RequestFrame(cancelled=[1] * 2**21).SerializeToString()
    parsed = []
    unparsed = SimpleNamespace(FromString=parsed.append)
    monkeypatch.setattr(frames, "pb", SimpleNamespace(RequestFrame=unparsed, AnswerFrame=pb.AnswerFrame))

    async def sent():
        yield frame

    server = Server()
    with pytest.raises(InvalidRequestError, match=r"^a frame begins or cancels more than 1024 requests$"):
        async for _ in frames.serve(sent(), server.answer):
            pass
    assert not parsed and not server.began


async def test_more_requests_than_a_frame_has_go_in_several():
    server = Server()
    stream = server.stream()
    callers = [Caller(stream, str(number).encode()) for number in range(2 * frames.FRAME_REQUESTS + 1)]
    await until(lambda: len(server.asked) == len(callers))
    for caller in callers:
        caller.leave()
    await until(lambda: len(server.cancelled) == len(callers))
    assert not stream.has_ended


async def test_who_reads_no_answers_is_asked_nothing_more(monkeypatch):
    monkeypatch.setattr(frames, "FRAME_REQUESTS", 10)
    taken = []

    async def sent():
        for first in itertools.count(step=10):
            await asyncio.sleep(0)
            taken.append(first)
            requests = [pb.NumberedRequest(number=number) for number in range(first, first + 10)]
            yield pb.RequestFrame(requests=requests).SerializeToString()

    async def refuse(_request):
        raise QueueFullError("full")

    async def turns():
        for _ in range(100):
            await asyncio.sleep(0)
        return len(taken)

    async with contextlib.aclosing(frames.serve(sent(), refuse)) as serving:
        await anext(serving)
        before = await turns()
        assert await turns() == before < 10
        await anext(serving)
        assert await turns() > before, "who reads on is"
