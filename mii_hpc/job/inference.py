"""The gRPC face of a replica's engine, on its leader."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TypeVar

import grpc
import grpc.aio

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc._proto import mii_hpc_pb2_grpc as pb_grpc
from mii_hpc.engine.base import Codec, Engine
from mii_hpc.errors import MIIError, RequestError
from mii_hpc.generation import GenerationRequest, Response
from mii_hpc.job.recording import Recorder, Recording
from mii_hpc.rpc import frames, transport, wire
from mii_hpc.rpc.frames import ServedRequest
from mii_hpc.rpc.wire import Context, Method

CALLS_PER_SECOND = 150
"""So many calls begin while requests run. Each takes a millisecond of Python, and the engine's thread, which needs the
interpreter between any two operators of a step, waits for it. A balancer has one call for all its requests."""

T = TypeVar("T")


class InferenceService(pb_grpc.EngineServicer):
    """Answers requests with an engine. Belongs to the event loop that it is made in."""

    def __init__(self, engine: Engine, codec: Codec) -> None:
        self._engine = engine
        self._codec = codec
        self._tokenising = ThreadPoolExecutor(1, thread_name_prefix="codec")
        self._numbers = itertools.count()
        self._recorder = Recorder()
        self._delivered = _Delivered()
        self._running = 0
        self._turn = asyncio.Lock()
        self._next_turn = 0.0

    def add_to(self, server: grpc.aio.Server) -> None:
        """Let a server answer with this service."""
        transport.add_inference(
            server,
            {
                Method.GENERATE: grpc.stream_stream_rpc_method_handler(self.generate),
                Method.TOKENIZE: grpc.unary_unary_rpc_method_handler(self.tokenize),
                Method.DESCRIBE: grpc.unary_unary_rpc_method_handler(self.describe),
            },
        )
        pb_grpc.add_EngineServicer_to_server(self, server)

    async def turn(self) -> None:
        """Wait until a call may begin: at once when no request runs, else in the order of arrival."""
        async with self._turn:
            if self._running:
                await asyncio.sleep(self._next_turn - time.monotonic())
            self._next_turn = time.monotonic() + 1 / CALLS_PER_SECOND

    async def generate(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """Answer all requests of the balancer; what the engine makes of them in one step goes back in one frame."""
        async with wire.answering(context), aclosing(frames.serve(requests, self._answer)) as answers:
            async for frame in answers:
                yield frame

    async def _answer(self, asked: ServedRequest) -> None:
        """Send the pieces of one request's answers. When the caller goes away, the engine forgets the request.

        The request is decoded here, so that a bad one fails alone and with our own error.
        """
        request = wire.unpack_request(wire.parse_request(asked.payload))
        recording = self._recorder.request()
        # Callers choose their ids without knowing of each other; the engine needs them unique. From what one reports
        # that is no stream, it can go on elsewhere.
        request = dataclasses.replace(request, id=f"{request.id}#{next(self._numbers)}", reports=True)
        answering = _Answering(asked, request, recording)
        self._engine.submit(request, self._delivered.to(answering.take))
        self._running += 1
        try:
            await answering.ended
        finally:
            self._running -= 1
            self._engine.cancel(request.id)

    async def tokenize(self, payload: bytes, context: Context) -> bytes:
        """Return a prompt's tokens."""
        async with wire.answering(context):
            prompt, plain = wire.unpack_tokenize(payload)
            result = await self._with_codec(lambda: self._codec.tokenize(prompt, plain))
            return wire.pack_tokenization(result).SerializeToString()

    async def describe(self, payload: bytes, context: Context) -> bytes:
        """Return what is served."""
        async with wire.answering(context):
            return wire.pack_description(await self._with_codec(self._codec.describe)).SerializeToString()

    async def _with_codec(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._tokenising, work)

    async def Load(self, request: pb.LoadRequest, context: Context) -> pb.LoadResponse:
        """Return the engine's load."""
        async with wire.answering(context):
            return wire.pack_load(self._recorder.added_to(self._engine.stats()))


class _Answering:
    """One request that the engine has: sends what comes of it.

    Attributes:
        ended: done when all answers are complete; raises the error that ends the request.
    """

    def __init__(self, asked: ServedRequest, request: GenerationRequest, recording: Recording) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked, self._recording = asked, recording
        self._is_stream = request.params.stream
        self._unfinished = request.params.num_return_sequences - sum(answer.ended for answer in request.resume)

    def take(self, item: Response | Exception) -> None:
        """Take what the engine delivers."""
        if self.ended.done():  # cancelled meanwhile, or failed
            return
        if isinstance(item, MIIError):
            self.ended.set_exception(item)
        elif isinstance(item, Exception):
            error = RequestError(f"the engine failed on this request: {item!r}")
            error.__cause__ = item
            self.ended.set_exception(error)
        else:
            ends = item.ended
            if ends or self._is_stream:
                self._recording.piece(item)
            try:
                self._asked.send(item.index, wire.pack_response(item))
            except Exception as error:  # noqa: BLE001 (it is too long, or whatever it is: of this request alone)
                self.ended.set_exception(error)
                return
            self._unfinished -= ends
            if not self._unfinished:
                self.ended.set_result(None)


class _Delivered:
    """What the engine's thread delivers, until the event loop takes all of it at once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[tuple[Callable[[Response | Exception], None], Response | Exception]] = deque()
        self._is_noticed = False

    def to(self, take: Callable[[Response | Exception], None]) -> Callable[[Response | Exception], None]:
        """Return what lets the engine's thread, or any other, deliver items that `take` is to get."""

        def deliver(item: Response | Exception) -> None:
            self._items.append((take, item))
            if not self._is_noticed:
                self._is_noticed = True
                self._loop.call_soon_threadsafe(self._take)

        return deliver

    def _take(self) -> None:
        self._is_noticed = False
        for _ in range(len(self._items)):  # not what comes meanwhile: an engine may be faster than this
            take, item = self._items.popleft()
            take(item)
