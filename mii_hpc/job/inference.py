"""The gRPC face of a replica's engine, on its leader."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TypeVar

import grpc
import grpc.aio

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc._proto import mii_hpc_pb2_grpc as pb_grpc
from mii_hpc.engine.base import Codec, Engine
from mii_hpc.errors import MIIError, RequestError
from mii_hpc.generation import GenerationRequest, Received, Response, joined
from mii_hpc.job.recording import Recorder
from mii_hpc.rpc import transport, wire
from mii_hpc.rpc.wire import Context, Method

REPORT_SECONDS = 0.2
"""How often a request that is no stream says what has come of it."""

T = TypeVar("T")


class InferenceService(pb_grpc.EngineServicer):
    """Answers requests with an engine. Belongs to one event loop."""

    def __init__(self, engine: Engine, codec: Codec) -> None:
        self._engine = engine
        self._codec = codec
        self._tokenising = ThreadPoolExecutor(1, thread_name_prefix="codec")
        self._numbers = itertools.count()
        self._recorder = Recorder()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Let a server answer with this service."""
        transport.add_inference(
            server,
            {
                Method.GENERATE: grpc.unary_stream_rpc_method_handler(self.generate),
                Method.TOKENIZE: grpc.unary_unary_rpc_method_handler(self.tokenize),
                Method.DESCRIBE: grpc.unary_unary_rpc_method_handler(self.describe),
            },
        )
        pb_grpc.add_EngineServicer_to_server(self, server)

    async def generate(self, payload: bytes, context: Context) -> AsyncIterator[bytes]:
        """Yield the pieces of one answer. When the caller goes away, the engine forgets the request.

        The request is decoded here, and not by gRPC, so that a bad one fails alone and with our own error.
        """
        recording = self._recorder.request()
        async with wire.answering(context):
            message = wire.parse_request(payload)
            request = wire.unpack_request(message)
            interval = REPORT_SECONDS if message.report and not request.params.stream else 0.0
            if message.report:
                request = dataclasses.replace(request, params=request.params.model_copy(update={"stream": True}))
            async with aclosing(self._pieces(request, interval)) as pieces:
                async for piece in pieces:
                    recording.piece(piece)
                    yield wire.encode_response(piece)

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

    async def _pieces(self, request: GenerationRequest, interval: float) -> AsyncGenerator[Response]:
        """Yield the pieces of a request's answers; but for the first, and the ends, what comes within an interval."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Response | Exception] = asyncio.Queue()

        def deliver(item: Response | Exception) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, item)

        received = Received(request.params.num_return_sequences, request.resume)
        # Clients choose their ids without knowing of each other; the engine needs them unique.
        request = dataclasses.replace(request, id=f"{request.id}#{next(self._numbers)}")
        self._engine.submit(request, deliver)
        try:
            seconds = 0.0
            while not received.ended:
                for piece in joined(await _gathered(arrived, seconds)):
                    received.take(piece)
                    yield piece
                seconds = interval
        finally:
            self._engine.cancel(request.id)


async def _gathered(arrived: asyncio.Queue[Response | Exception], seconds: float) -> list[Response]:
    """Return the next piece, and those that come within so many seconds, but none after an answer's last.

    Pieces that have gathered while the receiver was slow come at once. Raises the error that ends the request.
    """
    pieces: list[Response] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None) as scope:
            while not (pieces and pieces[-1].ended):
                item = await arrived.get()
                if isinstance(item, MIIError):
                    raise item
                if isinstance(item, Exception):
                    raise RequestError(f"the engine failed on this request: {item!r}") from item
                pieces.append(item)
                if seconds and len(pieces) == 1:
                    scope.reschedule(asyncio.get_running_loop().time() + seconds)
                if not seconds and arrived.empty():
                    break
    return pieces
