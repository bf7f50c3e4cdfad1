"""The gRPC face of a replica's engine, on its leader."""

from __future__ import annotations

import asyncio
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
from mii_hpc.errors import InvalidRequestError, MIIError, RequestError
from mii_hpc.generation import GenerationRequest, Response, joined
from mii_hpc.job.recording import Recorder
from mii_hpc.rpc import transport, wire
from mii_hpc.rpc.wire import Context, Method

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
        async with wire.answering(context), aclosing(self._pieces(wire.unpack_request(payload))) as pieces:
            async for piece in pieces:
                recording.piece(piece)
                message = wire.pack_response(piece).SerializeToString()
                if len(message) > wire.MAX_MESSAGE_BYTES:
                    raise InvalidRequestError(
                        f"a piece of the answer has {len(message)} bytes; {wire.MAX_MESSAGE_BYTES} are allowed"
                    )
                yield message

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

    async def _pieces(self, request: GenerationRequest) -> AsyncGenerator[Response]:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Response | Exception] = asyncio.Queue()

        def deliver(item: Response | Exception) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, item)

        unfinished = set(range(request.params.num_return_sequences))
        # Clients choose their ids without knowing of each other; the engine needs them unique.
        request = dataclasses.replace(request, id=f"{request.id}#{next(self._numbers)}")
        self._engine.submit(request, deliver)
        try:
            while unfinished:
                item = await arrived.get()
                # Pieces that gathered while the receiver was slow travel as one.
                while isinstance(item, Response) and not arrived.empty():
                    following = arrived.get_nowait()
                    if isinstance(following, Exception):
                        item = following
                    elif not item.ended and following.index == item.index:
                        (item,) = joined((item, following))
                    else:
                        yield item
                        unfinished -= {item.index} if item.ended else set()
                        item = following
                if isinstance(item, MIIError):
                    raise item
                if isinstance(item, Exception):
                    raise RequestError(f"the engine failed on this request: {item!r}") from item
                yield item
                unfinished -= {item.index} if item.ended else set()
        finally:
            self._engine.cancel(request.id)
