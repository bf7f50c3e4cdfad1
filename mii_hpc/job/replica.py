"""The engine process of one rank; the leader's also answers the Inference service over its engine."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

import grpc
import grpc.aio

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.deployments import credentials
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.engine.base import Engine, EngineSpec, create_engine
from mii_hpc.errors import MIIError, RequestError
from mii_hpc.generation import GenerationRequest, Response, joined
from mii_hpc.job.logs import log_to_stderr
from mii_hpc.job.process import end_with_rank, tell
from mii_hpc.rpc import transport, wire

log = logging.getLogger(__name__)


class InferenceService:
    """The gRPC face of a leader's engine. Belongs to one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._numbers = itertools.count()

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """Return the handlers of the Inference service. Requests are decoded here, so that a bad one fails alone."""
        return {
            wire.GENERATE.name: grpc.unary_stream_rpc_method_handler(
                self.generate, response_serializer=pb.GenerateChunk.SerializeToString
            ),
            wire.LOAD.name: grpc.unary_unary_rpc_method_handler(
                self.load,
                request_deserializer=pb.LoadRequest.FromString,
                response_serializer=pb.LoadResponse.SerializeToString,
            ),
        }

    async def generate(self, payload: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.GenerateChunk]:
        """Yield the pieces of one answer. When the caller goes away, the engine forgets the request."""
        try:
            async with aclosing(self._pieces(wire.unpack_request(payload))) as pieces:
                async for piece in pieces:
                    yield wire.pack_response(piece)
        except MIIError as error:
            await wire.abort(context, error)

    async def load(self, _request: pb.LoadRequest, _context: grpc.aio.ServicerContext) -> pb.LoadResponse:
        """Return the engine's load."""
        return wire.pack_load(self._engine.stats())

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


async def serve(run: RunDir, spec: EngineSpec, listen_host: str) -> None:
    """Load the engine and, on the leader, answer requests on `listen_host` until told to end by SIGINT.

    Raises whatever the engine raises when it cannot load or go on.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def end(error: Exception | None = None) -> None:
        if not ended.done():
            ended.set_exception(error) if error else ended.set_result(None)

    loop.add_signal_handler(signal.SIGINT, end)
    engine = create_engine(spec)

    def work() -> None:
        try:
            engine.load(lambda sentence: tell(progress=sentence))
            loop.call_soon_threadsafe(loaded.set)
            engine.run()
        except Exception as error:  # noqa: BLE001 (the thread's boundary: whatever it is ends the process)
            loop.call_soon_threadsafe(end, error)
        else:
            loop.call_soon_threadsafe(end)

    loaded = asyncio.Event()
    threading.Thread(target=work, name="engine", daemon=True).start()
    loading = asyncio.ensure_future(loaded.wait())
    await asyncio.wait((loading, ended), return_when=asyncio.FIRST_COMPLETED)
    loading.cancel()
    if ended.done():
        return ended.result()
    if spec.rank != 0:
        tell(ready="")
        return await ended
    keys = credentials.load_server(run)
    server = transport.create_server(
        {wire.GENERATE.service: InferenceService(engine).handlers()},
        admits=lambda _method, token: transport.same_token(token, keys.rank_token),
    )
    port = transport.listen(server, f"{listen_host}:0", keys)
    await server.start()
    tell(ready=f"{listen_host}:{port}")
    log.info("answering on %s:%d", listen_host, port)
    try:
        await ended
    finally:
        engine.close()
        await server.stop(0)


def main(run_path: str, place: str, listen_host: str) -> None:
    """Run one engine process; `place` is its EngineSpec as JSON, without the model.

    Its exit status is 0 when it was told to end, 1 when it failed.
    """
    end_with_rank()
    log_to_stderr()
    run = RunDir(Path(run_path))
    status = 0
    try:
        spec = EngineSpec(model=run.load_config().model_conf, **json.loads(place))
        asyncio.run(serve(run, spec, listen_host))
    except Exception as error:
        log.exception("the engine has failed")
        tell(failed=f"{type(error).__name__}: {error}")
        status = 1
    # The engine's thread may be inside a collective that will never return; nothing is left to save.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
