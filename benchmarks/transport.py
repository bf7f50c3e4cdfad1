"""What it costs that clients show certificates: `python benchmarks/transport.py [--rounds 7]`.

Prints how long a new connection takes, with one small call, and a message and its answer on a stream that is open: with
a server that asks its clients for a certificate, and with one that does not, in turns. Server and client are a process
each. See streams.py for what passes through a balancer.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import grpc.aio
from rich.console import Console

from mii_hpc.config import resolve
from mii_hpc.deployments import credentials
from mii_hpc.deployments.credentials import ClientCredentials
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.job.balancer.access import Access
from mii_hpc.rpc import transport
from mii_hpc.rpc.wire import Context, Method
from mii_hpc.submission import submit as submission


async def nothing(_request: bytes, _context: Context) -> bytes:
    """Answer a call with no bytes."""
    return b""


async def echo(messages: AsyncIterator[bytes], _context: Context) -> AsyncIterator[bytes]:
    """Answer each message with itself."""
    async for message in messages:
        yield message


def run_doors(run: RunDir, asks: bool, told: Connection) -> None:
    """Serve a small method; a server that `asks` is one as ours, the other has TLS and no more."""

    async def serve() -> None:
        keys = credentials.load_server(run)
        server = transport.create_server(lambda _method, _token: True)
        transport.add_inference(
            server,
            {
                Method.DESCRIBE: grpc.unary_unary_rpc_method_handler(nothing),
                Method.GENERATE: grpc.stream_stream_rpc_method_handler(echo),
            },
        )
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


async def connection_seconds(keys: ClientCredentials, address: str, connections: int = 50) -> float:
    """Return how long a new connection with one call takes."""
    began = time.perf_counter()
    for _ in range(connections):
        async with transport.open_channel(address, keys) as channel:
            describe: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(Method.DESCRIBE)
            await describe(b"")
    return (time.perf_counter() - began) / connections


async def message_seconds(keys: ClientCredentials, address: str, messages: int = 500) -> float:
    """Return how long a message of 1 KiB on a stream takes, there and back."""
    async with transport.open_channel(address, keys) as channel:
        stream: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(Method.GENERATE)()
        await stream.write(b"")
        await stream.read()
        began = time.perf_counter()
        for _ in range(messages):
            await stream.write(bytes(1024))
            await stream.read()
        seconds = (time.perf_counter() - began) / messages
        await stream.done_writing()
        await stream.read()
    return seconds


def started(run: RunDir, asks: bool) -> str:
    """Start a server and return the address that it tells."""
    mine, its = multiprocessing.Pipe()
    multiprocessing.Process(target=run_doors, args=(run, asks, its), daemon=True).start()
    if not mine.poll(30):
        raise TimeoutError("the server did not start")
    return str(mine.recv())


def main() -> None:
    """Measure both servers in turn, and print medians."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    given = options.parse_args()
    multiprocessing.set_start_method("spawn")
    with tempfile.TemporaryDirectory() as home:
        engine = {"engine": "echo"}
        run, _ = submission.prepare(resolve(inference_engine_config=engine, home=Path(home) / "home", cluster="local"))
        doors = {asks: started(run, asks) for asks in (False, True)}
        owner = credentials.load_owner(run)
        keys = {False: replace(owner, identity=b""), True: owner}
        measures = {"a new connection": connection_seconds, "a message on a stream": message_seconds}
        seconds: dict[tuple[str, bool], list[float]] = {}
        for _ in range(given.rounds + 1):  # the first one warms up
            for (what, measure), asks in itertools.product(measures.items(), doors):
                seconds.setdefault((what, asks), []).append(asyncio.run(measure(keys[asks], doors[asks])))
    for what in measures:
        plain, mutual = (seconds[what, asks][1:] for asks in (False, True))
        ratio = statistics.median(with_it / without for with_it, without in zip(mutual, plain, strict=True))
        Console(width=120).print(
            f"{what}: TLS alone {statistics.median(plain) * 1e3:.2f} ms, with the client's certificate "
            f"{statistics.median(mutual) * 1e3:.2f} ms, ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
