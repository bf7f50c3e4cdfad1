import asyncio
import itertools

import pytest

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.config import GenerateParamsConfig
from mii_hpc.errors import RequestError
from mii_hpc.generation import GenerationFinishReason, GenerationRequest, Load, Response
from mii_hpc.job import inference
from mii_hpc.job.inference import InferenceService
from mii_hpc.rpc import frames, wire
from tests.waiting import until


class Engine:
    """An engine that makes what the test says, in one thread with it."""

    def __init__(self):
        self.delivers, self.cancelled = {}, []

    def submit(self, request, deliver):
        assert request.reports, "what comes of it is wanted also where it is no stream"
        self.delivers[request.prompt] = deliver

    def cancel(self, request_id):
        self.cancelled.append(request_id)

    def stats(self):
        return Load()


class Balancer:
    """The other side of the stream: `frames` are what it was sent."""

    def __init__(self, engine):
        self.frames, self._requests, self._numbers = [], asyncio.Queue(), itertools.count()
        self._service = InferenceService(engine, None)
        self._reading = asyncio.create_task(self._read())

    async def _read(self):
        async def sent():
            while (frame := await self._requests.get()) is not None:
                yield frame.SerializeToString()

        async for frame in frames.serve(sent(), self._service._answer):
            self.frames.append(
                [(p.number, p.chunk, p.ends, p.failure) for p in pb.AnswerFrame.FromString(frame).pieces]
            )

    def ask(self, *prompts, **params):
        requests = [GenerationRequest(prompt, prompt, GenerateParamsConfig(**params)) for prompt in prompts]
        packed = [
            pb.NumberedRequest(number=next(self._numbers), request=wire.pack_request(each).SerializeToString())
            for each in requests
        ]
        self._requests.put_nowait(pb.RequestFrame(requests=packed))

    def cancel(self, number):
        self._requests.put_nowait(pb.RequestFrame(cancelled=[number]))

    async def end(self):
        self._requests.put_nowait(None)
        await self._reading

    def texts(self):
        return [
            [(number, wire.unpack_response(chunk).generated_text) for number, chunk, _, _ in frame if chunk]
            for frame in self.frames
        ]


def token(text, **fields):
    return Response(text, 1, 1, token_ids=(1,), **fields)


LAST = {"finish_reason": GenerationFinishReason.STOP}


@pytest.fixture
def engine():
    return Engine()


async def test_the_tokens_of_one_step_go_back_in_one_frame(engine):
    balancer = Balancer(engine)
    balancer.ask("a", "b", "c", stream=True)
    await until(lambda: len(engine.delivers) == 3)
    for step in range(3):
        for prompt, deliver in engine.delivers.items():
            deliver(token(f"{prompt}{step}", **(LAST if step == 2 else {})))
        await until(lambda: len(balancer.frames) > step)  # noqa: B023
    await balancer.end()
    assert balancer.texts()[:3] == [[(0, f"a{n}"), (1, f"b{n}"), (2, f"c{n}")] for n in range(3)]
    ends = [number for frame in balancer.frames for number, _, ends, _ in frame if ends]
    assert sorted(ends) == [0, 1, 2]
    assert len(engine.cancelled) == 3


async def test_a_cancelled_request_is_forgotten_and_what_comes_of_it_dropped(engine):
    balancer = Balancer(engine)
    balancer.ask("a", "b", stream=True)
    await until(lambda: len(engine.delivers) == 2)
    balancer.cancel(0)
    await until(lambda: engine.cancelled)
    assert engine.cancelled[0].startswith("a#")
    for deliver in engine.delivers.values():
        deliver(token("1", **LAST))
    await balancer.end()
    assert [text for frame in balancer.texts() for text in frame] == [(1, "1")]


async def test_what_cannot_be_sent_fails_alone(engine):
    balancer = Balancer(engine)
    balancer.ask("a", "b", "c", stream=True)
    await until(lambda: len(engine.delivers) == 3)
    engine.delivers["a"](token("\ud800"))
    engine.delivers["b"](ZeroDivisionError("a bug"))
    engine.delivers["c"](token("1", **LAST))
    await balancer.end()
    failures = {number: failure for frame in balancer.frames for number, _, ends, failure in frame if ends}
    assert [type(wire.unpack_failure(failures[number])) for number in (0, 1)] == [RequestError] * 2
    assert "the engine failed on this request: ZeroDivisionError('a bug')" in failures[1].message
    assert not failures[2].message
    assert [text for frame in balancer.texts() for text in frame] == [(2, "1")]


async def test_an_engine_that_is_faster_than_the_event_loop_leaves_it_its_turns(engine):
    balancer = Balancer(engine)
    balancer.ask("a", stream=True)
    await until(lambda: engine.delivers)
    delivered, lasts = balancer._service._delivered, True

    def take(item):  # while this takes one, there is the next
        if lasts:
            delivered.to(take)(item)

    delivered.to(take)(token("x"))
    engine.delivers["a"](token("1", **LAST))
    await balancer.end()
    lasts = False
    assert balancer.texts()[0] == [(0, "1")]


async def test_calls_wait_for_each_other_while_requests_run(engine, monkeypatch):
    monkeypatch.setattr(inference, "CALLS_PER_SECOND", 1 / 3600)
    balancer = Balancer(engine)
    service = balancer._service
    for _ in range(3):
        await service.turn()
    balancer.ask("a")
    await until(lambda: engine.delivers)
    waiting = [asyncio.create_task(service.turn()) for _ in range(2)]
    await asyncio.wait(waiting, timeout=0)
    assert not any(each.done() for each in waiting)
    for each in waiting:
        each.cancel()
    await asyncio.wait(waiting)
    engine.delivers["a"](token("1", **LAST))
    await balancer.end()
    await service.turn()
