"""What TLS and the token cost: small messages streamed through our balancer, and through a bare gRPC proxy.

`python benchmarks/transport.py` prints, for 1 and 16 streams at once, the messages per second of each way and their
ratio. Source, proxy and client are processes of their own in both; the source sends ready-made pieces of an answer,
as a replica does when it makes one token per message, only faster than any engine.

Then it prints how long a new connection takes, with one small call: to a server that asks its clients for a
certificate, and to one that does not.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import grpc.aio
from rich.console import Console
from rich.table import Table

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.config import resolve
from mii_hpc.deployments import credentials
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.job.balancer.access import Access
from mii_hpc.job.balancer.balancer import Balancer
from mii_hpc.job.balancer.connection import ReplicaConnection
from mii_hpc.rpc import transport
from mii_hpc.rpc.wire import Context, Method
from mii_hpc.submission import submit as submission

REQUEST = pb.GenerateRequest(params=pb.GenerateParams(stream=True)).SerializeToString()
PIECE = pb.GenerateChunk(text="word ", token_ids=[1234], generated_length=1).SerializeToString()


def source(messages: int) -> grpc.RpcMethodHandler[bytes, bytes]:
    """Return a handler that answers every request with so many small messages."""

    async def generate(_request: bytes, _context: Context) -> AsyncIterator[bytes]:
        for _ in range(messages):
            yield PIECE

    return grpc.unary_stream_rpc_method_handler(generate)


def run_source(run: RunDir, ours: bool, messages: int, told: Connection) -> None:
    """Serve the source until the process is ended."""

    async def serve() -> None:
        keys = credentials.load_server(run)
        if ours:
            server = transport.create_server(lambda _method, token: transport.same_token(token, keys.rank_token))
            port = transport.listen(server, "127.0.0.1:0", keys)
        else:
            server = grpc.aio.server()  # without TLS, token or limits
            port = server.add_insecure_port("127.0.0.1:0")
        transport.add_inference(server, {Method.GENERATE: source(messages)})
        await server.start()
        told.send(f"127.0.0.1:{port}")
        await server.wait_for_termination()

    asyncio.run(serve())


def run_proxy(run: RunDir, ours: bool, address: str, told: Connection) -> None:
    """Serve our balancer, or a bare proxy, in front of the source."""

    async def serve() -> None:
        keys = credentials.load_server(run)
        if ours:
            balancer = Balancer(run, run.load_config(), keys, run.begin(0))
            channel = transport.open_channel(address, keys.as_client)
            balancer.router.add(ReplicaConnection(0, 1, "localhost", channel, keys.as_client))
            server, port = balancer.server, await balancer.listen("127.0.0.1:0")
        else:
            upstream = grpc.aio.insecure_channel(address)

            async def passed_on(requests: AsyncIterator[bytes], _context: Context) -> AsyncIterator[bytes]:
                generate: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = upstream.unary_stream(Method.GENERATE)
                async for piece in generate(await anext(requests)):
                    yield piece

            server = grpc.aio.server()
            transport.add_inference(server, {Method.GENERATE: grpc.stream_stream_rpc_method_handler(passed_on)})
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
        told.send(f"127.0.0.1:{port}")
        await server.wait_for_termination()

    asyncio.run(serve())


async def messages_per_second(run: RunDir, ours: bool, address: str, streams: int, messages: int) -> float:
    """Read so many streams at once to their ends."""
    keys = credentials.load_owner(run)
    channel = transport.open_channel(address, keys) if ours else grpc.aio.insecure_channel(address)
    metadata = transport.authorization(keys) if ours else ()

    generate: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(Method.GENERATE)

    async def read() -> int:
        return len([piece async for piece in generate(REQUEST, metadata=metadata)])

    async with channel:
        await channel.channel_ready()
        began = time.perf_counter()
        counts = await asyncio.gather(*(read() for _ in range(streams)))
        seconds = time.perf_counter() - began
    if counts != [messages] * streams:
        raise RuntimeError(f"messages were lost: {counts}")
    return sum(counts) / seconds


def run_doors(run: RunDir, asks: bool, told: Connection) -> None:
    """Serve a small method; a server that `asks` is one as ours, the other has TLS and no more."""

    async def serve() -> None:
        keys = credentials.load_server(run)
        server = transport.create_server(lambda _method, _token: True)
        transport.add_inference(server, {Method.GENERATE: source(1)})
        if asks:
            access = Access(run, run.load_config())
            port = transport.listen(server, "127.0.0.1:0", keys, lambda: access.certificates)
        else:
            doors = grpc.ssl_server_credentials([(keys.key, keys.certificate)])
            port = server.add_secure_port("127.0.0.1:0", doors)
        await server.start()
        told.send(f"127.0.0.1:{port}")
        await server.wait_for_termination()

    asyncio.run(serve())


async def connection_seconds(run: RunDir, asks: bool, address: str, connections: int = 50) -> float:
    """Return how long a new connection with one call takes."""
    keys = credentials.load_owner(run)
    keys = keys if asks else replace(keys, identity=b"")
    began = time.perf_counter()
    for _ in range(connections):
        async with transport.open_channel(address, keys) as channel:
            generate: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(Method.GENERATE)
            async for _ in generate(REQUEST):
                pass
    return (time.perf_counter() - began) / connections


def started(target: Callable[..., None], *args: object) -> str:
    """Start a process and return the address that it tells."""
    mine, its = multiprocessing.Pipe()
    multiprocessing.Process(target=target, args=(*args, its), daemon=True).start()
    if not mine.poll(30):
        raise TimeoutError(f"{target.__name__} did not start")
    return str(mine.recv())


def main() -> None:
    """Measure both ways in turn, and print medians."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--messages", type=int, default=2000, help="per stream")
    options.add_argument("--rounds", type=int, default=7)
    given = options.parse_args()
    multiprocessing.set_start_method("spawn")
    table = Table("streams", "bare proxy, messages/s", "balancer with TLS and token, messages/s", "ratio")
    with tempfile.TemporaryDirectory() as home:
        engine = {"engine": "echo"}
        run, _ = submission.prepare(resolve(inference_engine_config=engine, home=Path(home) / "home", cluster="local"))
        addresses = {
            ours: started(run_proxy, run, ours, started(run_source, run, ours, given.messages))
            for ours in (False, True)
        }
        for streams in (1, 16):
            rates: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(given.rounds + 1):  # the first one warms up
                for ours, address in addresses.items():
                    rates[ours].append(asyncio.run(messages_per_second(run, ours, address, streams, given.messages)))
            bare, own = (rates[ours][1:] for ours in (False, True))
            ratio = statistics.median(b / a for a, b in zip(bare, own, strict=True))
            table.add_row(
                str(streams), f"{statistics.median(bare):.0f}", f"{statistics.median(own):.0f}", f"{ratio:.2f}"
            )
        doors = {asks: started(run_doors, run, asks) for asks in (False, True)}
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(given.rounds + 1):
            for asks, address in doors.items():
                seconds[asks].append(asyncio.run(connection_seconds(run, asks, address)))
        plain, mutual = (statistics.median(seconds[asks][1:]) * 1e3 for asks in (False, True))
    Console().print(table)
    Console().print(
        f"a new connection: TLS alone {plain:.2f} ms, with the client's certificate {mutual:.2f} ms, "
        f"ratio {mutual / plain:.2f}"
    )


if __name__ == "__main__":
    main()
