"""What hostile callers do to good ones: fuzzed messages, strangers' floods, and one guest at his worst.

`python benchmarks/hostile.py [fuzz] [floods] [guest] [--count 100000] [--seconds 15] [--rounds 3] [--model folder]`
serves on this machine, asks it all the time, and attacks it now and then from processes of their own. For each attack
it prints what good callers have seen of it beside what they saw undisturbed, in turns, and what it has left in the
processes of the deployment.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import grp
import itertools
import math
import multiprocessing
import os
import random
import resource
import select
import socket
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpc
import grpc.aio
import psutil
from rich.console import Console
from rich.table import Table

import mii_hpc as mii
from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.clients.asynchronous import AsyncMIIClient
from mii_hpc.config import MIIConfig
from mii_hpc.deployments import credentials, sharing
from mii_hpc.deployments.credentials import ClientCredentials
from mii_hpc.deployments.registry import Registry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.job.balancer.access import GUEST_METHODS
from mii_hpc.rpc import transport
from mii_hpc.rpc.wire import Method

console = Console(width=160)

CALLERS = 8
"""Good callers at once."""
QUIET_SECONDS = 5.0
SETTLE_SECONDS = 20.0
"""By when a process has given back what an attack has cost it: idle connections live for two seconds, heaps are
trimmed every second."""
FUZZERS = 64
"""Fuzzed calls at once."""

INTEGERS = (0, 1, -1, 2, 3, 7, 20, 1000, 2**31 - 1, -(2**31))
FLOATS = (0.0, 1.0, -1.0, 0.5, 1e-308, 1e308, math.nan, math.inf, -math.inf)
TEXTS = ("", "a", "to be or not", "\0", "\x1b[2J", "é😀" * 20, "a" * 10_000, " " * 1000, "word " * 500, "{{ x }}", "[]")


def fuzzed(rng: random.Random) -> bytes:
    """Return a message that is none, nearly one, or one of odd values."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randrange(300))
    request = odd(rng).SerializeToString()
    if kind == 1:
        return damaged(rng, odd_frame(rng, request).SerializeToString())
    if kind == 2:
        return odd_frame(rng, damaged(rng, request)).SerializeToString()
    return request if kind == 3 else odd_frame(rng, request).SerializeToString()


def damaged(rng: random.Random, message: bytes) -> bytes:
    """Return a message with some bytes changed, or two beginnings of it."""
    if rng.random() < 0.5 and message:
        changed = bytearray(message)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    return message[: rng.randrange(len(message) + 1)] + message[: rng.randrange(len(message) + 1)]


def odd_frame(rng: random.Random, request: bytes) -> pb.RequestFrame:
    """Return a frame with a request, once or more, that says of it what nobody means."""
    frame = pb.RequestFrame(cancelled=rng.choices(INTEGERS, k=rng.randrange(3)))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        position = rng.choice((*TEXTS, "batch/0/2", f"{'b' * 10_000}/0/2", f"batch/{'9' * 5000}/2"))
        number, timeout = rng.choice(INTEGERS), rng.choice(FLOATS)
        frame.requests.add(number=number, request=request, timeout=timeout, position=position)
    return frame


def odd(rng: random.Random) -> pb.GenerateRequest:
    """Return a request of values that nobody means."""
    params: dict[str, Any] = {}
    for option in pb.GenerateParams.DESCRIPTOR.fields:
        if rng.random() < 0.12:
            params[option.name] = odd_value(rng, option)
    params.setdefault("max_new_tokens", rng.choice((1, 2, 3, 5)))
    message = pb.GenerateRequest(id=rng.choice(TEXTS), params=pb.GenerateParams(**params))
    match rng.randrange(4):
        case 0:
            message.prompt_ids.extend(rng.choices(INTEGERS, k=rng.randrange(20)))
        case 1:
            message.chat = rng.choice((*TEXTS, '{"messages": []}', '{"messages": [{"role": 1}]}', "[" * 5000))
        case _:
            message.prompt = rng.choice(TEXTS)
    for _ in range(rng.choice((0, 0, 0, 1, 2, 5))):
        tokens = rng.choices(INTEGERS, k=rng.randrange(5))
        message.resume.add(token_ids=tokens, characters=rng.choice(INTEGERS), ended=rng.random() < 0.3)
    message.admitted, message.caller = rng.random() < 0.5, rng.choice(TEXTS)
    return message


def odd_value(rng: random.Random, option: Any) -> Any:
    """Return a value for a field of a message, of its type."""
    if option.message_type is not None:  # the one map
        return {rng.choice(INTEGERS): rng.choice(FLOATS) for _ in range(rng.randrange(4))}
    values: dict[int, Sequence[Any]] = {
        option.TYPE_BOOL: (True, False),
        option.TYPE_DOUBLE: FLOATS,
        option.TYPE_STRING: TEXTS,
        option.TYPE_INT64: (*INTEGERS, 2**63 - 1, -(2**63)),
    }
    choices = values.get(option.type, INTEGERS)
    return rng.choices(choices, k=rng.randrange(70)) if option.is_repeated else rng.choice(choices)


async def fuzz(
    address: str,
    keys: ClientCredentials,
    methods: Sequence[str],
    count: int,
    rng: random.Random,
    timeout: float = 1.0,
) -> int:
    """Send so many fuzzed messages; return how many. Raises TimeoutError when a call neither answers nor ends."""
    numbers = iter(range(count))

    async def send(channel: grpc.aio.Channel) -> None:
        for _ in numbers:
            call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(rng.choice(methods))(
                metadata=transport.authorization(keys), timeout=timeout
            )
            async with asyncio.timeout(30 * timeout):
                with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):
                    for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 1, 2))):
                        await call.write(fuzzed(rng))
                    await call.done_writing()
                    while await call.read() is not grpc.aio.EOF:
                        pass
            call.cancel()

    async with transport.open_channel(address, keys) as channel:
        await channel.channel_ready()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(FUZZERS):
                tasks.create_task(send(channel))
    return count


# --- attacks: each runs in a process of its own, and returns how often it has tried ---


def give_way() -> None:
    """Let all other processes of this machine have its cores first.

    Where single slow requests are looked for: beside a process that fills a core, the kernel now and then keeps those
    that wait for two cores waiting for a tenth of a second, which is not what the messages do to their server.
    """
    os.setsid()  # else the priority among groups of processes is that of the callers, too
    os.nice(19)
    with contextlib.suppress(OSError):  # a kernel without such groups
        Path("/proc/self/autogroup").write_text("19")


@dataclass(frozen=True)
class Target:
    """What an attacker knows: the addresses, and the keys that he has."""

    balancer: str
    replica: str
    guest: ClientCredentials
    ranks: ClientCredentials
    seconds: float
    count: int
    rounds: int

    @property
    def place(self) -> tuple[str, int]:
        """Host and port of the balancer."""
        host, _, port = self.balancer.rpartition(":")
        return host, int(port)


def fuzz_balancer(target: Target) -> int:
    """With a guest's valid token."""
    methods = [*GUEST_METHODS, *([Method.GENERATE] * 8), "/no.such/Method"]
    return asyncio.run(fuzz(target.balancer, target.guest, methods, target.count, random.Random(1)))


def fuzz_replica(target: Target) -> int:
    """With the ranks' own token, as only the balancer has it."""
    methods = [*Method, *([Method.GENERATE] * 8), "/no.such/Method"]
    return asyncio.run(fuzz(target.replica, target.ranks, methods, target.count, random.Random(2)))


def until(target: Target) -> itertools.takewhile[int]:
    """Count for as long as the attack goes on."""
    ends = time.monotonic() + target.seconds
    return itertools.takewhile(lambda _: time.monotonic() < ends, itertools.count())


def connected(target: Target) -> socket.socket | None:
    """Return a new connection, or None where there is no room for it."""
    try:
        return socket.create_connection(target.place, timeout=5)
    except OSError:
        time.sleep(0.001)
        return None


def handshakes_without_certificate(target: Target) -> int:
    """TLS as far as it goes."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    tried = 0
    for _ in until(target):
        tried += 1
        if (connection := connected(target)) is not None:
            with contextlib.suppress(OSError), context.wrap_socket(connection) as tls:
                tls.recv(1)
            connection.close()
    return tried


def rubbish(target: Target) -> int:
    """64 random bytes on each connection, which is reset."""
    tried = 0
    for _ in until(target):
        tried += 1
        if (connection := connected(target)) is not None:
            with contextlib.suppress(OSError):
                connection.sendall(os.urandom(64))
            reset(connection)
    return tried


def resets(target: Target) -> int:
    """Connections that are reset at once."""
    tried = 0
    for _ in until(target):
        tried += 1
        if (connection := connected(target)) is not None:
            reset(connection)
    return tried


def reset(connection: socket.socket) -> None:
    """Close a connection with RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


def idle(target: Target, says: bytes = b"", size: int = 5000) -> int:
    """So many connections that say nothing; each comes again when the server has closed it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    opened: dict[int, socket.socket] = {}
    tried = 0
    with select.epoll() as closed:
        for _ in until(target):
            while len(opened) < size and (connection := connected(target)) is not None:
                tried += 1
                with contextlib.suppress(OSError):
                    connection.sendall(says)
                opened[connection.fileno()] = connection
                closed.register(connection, select.EPOLLRDHUP)
            for descriptor, _events in closed.poll(0.05):
                opened.pop(descriptor).close()
        for connection in opened.values():
            connection.close()
    return tried


def half_open(target: Target) -> int:
    """5,000 connections with the beginning of a TLS handshake."""
    return idle(target, b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03" + bytes(100))


def own_certificate(target: Target) -> int:
    """Calls with a certificate that the stranger has made himself."""
    identity = "".join(credentials.self_signed(credentials.TLS_NAME, is_authority=True)).encode()
    return calls(target, replace(target.guest, identity=identity, token="wrong"), channels=16)


def wrong_token(target: Target) -> int:
    """Calls with a guest's certificate and a wrong token."""
    return calls(target, replace(target.guest, token="wrong"))


def oversized_headers(target: Target) -> int:
    """Calls of a guest whose metadata is too long."""
    return calls(target, target.guest, (("x", "y" * 60_000),))


def calls(target: Target, keys: ClientCredentials, more: tuple[tuple[str, str], ...] = (), channels: int = 1) -> int:
    """Make calls, as many as one process can."""

    async def press() -> int:
        count = itertools.count()
        ends = time.monotonic() + target.seconds

        async def go_on(channel: grpc.aio.Channel) -> None:
            metadata = (*transport.authorization(keys), *more)
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(Method.STATUS)
            while time.monotonic() < ends:
                next(count)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await call(b"", metadata=metadata, timeout=2)

        async with contextlib.AsyncExitStack() as opened:
            ways = [
                await opened.enter_async_context(transport.open_channel(target.balancer, keys)) for _ in range(channels)
            ]
            await asyncio.gather(*(go_on(ways[number % channels]) for number in range(32)))
        return next(count)

    return asyncio.run(press())


def rapid_resets(target: Target) -> int:
    """HTTP/2 streams of a guest that are reset as soon as they are opened."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with tempfile.NamedTemporaryFile() as file:
        file.write(target.guest.identity)
        file.flush()
        context.load_cert_chain(file.name)

    def literal(name: bytes, value: bytes) -> bytes:
        return b"\0" + b"".join(bytes((len(text),)) + text for text in (name, value))

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload

    headers = [(b":method", b"POST"), (b":scheme", b"https"), (b":path", Method.GENERATE.encode())]
    headers += [(b":authority", b"mii-hpc"), (b"te", b"trailers"), (b"content-type", b"application/grpc")]
    headers += [(b"authorization", f"Bearer {target.guest.token}".encode())]
    block = b"".join(literal(*each) for each in headers)
    tried = 0
    for _ in until(target):
        if (connection := connected(target)) is None:
            continue
        with contextlib.suppress(OSError), context.wrap_socket(connection) as tls:
            tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
            tls.settimeout(2)
            for stream in range(1, 200_001, 200):
                burst = (
                    frame(1, 4, each, block) + frame(3, 0, each, b"\0\0\0\x08")
                    for each in range(stream, stream + 200, 2)
                )
                tls.sendall(b"".join(burst))
                tried += 100
                tls.setblocking(False)
                with contextlib.suppress(ssl.SSLWantReadError):
                    while tls.recv(65536):
                        pass
                tls.settimeout(2)
                if not list(itertools.islice(until(target), 1)):
                    break
        connection.close()
    return tried


def at_worst(target: Target, ask: Callable[[grpc.aio.Channel, tuple[tuple[str, str], ...]], Any], at_once: int) -> int:
    """Ask as a guest, so many at once, again and again, until the time is over."""

    async def press() -> int:
        count = itertools.count()

        async def go_on(channel: grpc.aio.Channel) -> None:
            while True:
                next(count)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await ask(channel, transport.authorization(target.guest))

        async with contextlib.AsyncExitStack() as opened:
            ways = [
                await opened.enter_async_context(transport.open_channel(target.balancer, target.guest))
                for _ in range(1 + at_once // 3000)
            ]
            tasks = [asyncio.create_task(go_on(ways[number % len(ways)])) for number in range(at_once)]
            await asyncio.sleep(target.seconds)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return next(count)

    return asyncio.run(press())


def request(**fields: Any) -> Callable[[grpc.aio.Channel, tuple[tuple[str, str], ...]], Any]:
    """Return a way to ask for one answer and to read it to its end."""
    message = pb.NumberedRequest(request=pb.GenerateRequest(id="worst", **fields).SerializeToString())
    frame = pb.RequestFrame(requests=[message]).SerializeToString()

    async def ask(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(Method.GENERATE)
        async for _ in call(frame, metadata=metadata):
            pass

    return ask


def long_prompts(target: Target) -> int:
    """Prompts of 15 MB, two at once."""
    return at_worst(target, request(prompt="word " * 3_000_000), 2)


def many_stops(target: Target) -> int:
    """64 stop strings of 1,000 characters for 64 answers."""
    stops = [chr(97 + number % 26) * 1000 + str(number) for number in range(64)]
    params = pb.GenerateParams(stop=stops, num_return_sequences=64, max_new_tokens=200, ignore_eos=True, stream=True)
    return at_worst(target, request(prompt="a", params=params), 4)


def endless_requests(target: Target) -> int:
    """1,280 requests as long as can be."""
    return at_worst(target, request(prompt="a", params=pb.GenerateParams(ignore_eos=True, max_new_tokens=10**6)), 1280)


def empty_streams(target: Target) -> int:
    """9,000 calls that send no request."""

    async def ask(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        await channel.stream_stream(Method.GENERATE)(metadata=metadata).read()

    return at_worst(target, ask, 9000)


def statuses(target: Target) -> int:
    """Asks for the status, 64 at once."""

    async def ask(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(Method.STATUS)
        await call(b"", metadata=metadata)

    return at_worst(target, ask, 64)


FUZZ = {"fuzz, balancer": fuzz_balancer, "fuzz, replica": fuzz_replica}
FLOODS: dict[str, Callable[[Target], int]] = {
    "handshakes without a certificate": handshakes_without_certificate,
    "certificate of his own": own_certificate,
    "rubbish": rubbish,
    "resets": resets,
    "half-open handshakes": half_open,
    "5,000 idle connections": idle,
    "guest: wrong token": wrong_token,
    "guest: oversized headers": oversized_headers,
    "guest: rapid resets": rapid_resets,
}
WORST: dict[str, Callable[[Target], int]] = {
    "guest: prompts of 15 MB": long_prompts,
    "guest: 64 stop strings, 64 answers": many_stops,
    "guest: 1,280 endless requests": endless_requests,
    "guest: 9,000 empty streams": empty_streams,
    "guest: 64 at once ask for the status": statuses,
}


# --- what good callers see ---


@dataclass
class Seen:
    """What good callers have seen: how long each request took, in seconds, and what has failed."""

    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    lasted: float = 0.0

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.seconds) / self.lasted

    @property
    def middle(self) -> float:
        """The median time of a request."""
        return statistics.median(self.seconds) if self.seconds else math.inf

    @property
    def slowest(self) -> float:
        """The longest time of a request."""
        return max(self.seconds, default=math.inf)

    def add(self, other: Seen) -> None:
        """Count what callers have seen at another time, too."""
        self.seconds += other.seconds
        self.failed += other.failed
        self.lasted += other.lasted


@contextlib.asynccontextmanager
async def callers(client: AsyncMIIClient, words: int) -> AsyncIterator[Seen]:
    """Ask all the time while this context lasts."""
    seen, began, going_on = Seen(), time.monotonic(), True

    async def ask(number: int) -> None:
        prompt = " ".join(f"w{number}x{each}" for each in range(words))
        while going_on:
            at = time.monotonic()
            try:
                await client.generate(prompt, max_new_tokens=words, ignore_eos=True, do_sample=False)
            except mii.MIIError as error:
                seen.failed.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.1)
            else:
                seen.seconds.append(time.monotonic() - at)

    tasks = [asyncio.create_task(ask(number)) for number in range(CALLERS)]
    try:
        yield seen
    finally:
        seen.lasted = time.monotonic() - began
        going_on = False
        await asyncio.gather(*tasks)


def processes(run: RunDir) -> dict[int, str]:
    """Return the deployment's processes by id, with what each is."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if str(run.path) in line and "-m" in line:
            found[process.pid] = line[line.index("-m") + 1].rpartition(".")[2]
    return found


def held(pids: dict[int, str]) -> dict[int, tuple[int, float]]:
    """Return the open files and the MiB of each process that is there."""
    found = {}
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found[pid] = process.num_fds(), process.memory_info().rss / 2**20
    return found


async def attacked(
    name: str, attack: Callable[[Target], int], client: AsyncMIIClient, run: RunDir, target: Target, words: int
) -> tuple[str, ...]:
    """Make one attack, in several rounds; return a row of the table."""
    quiet, seen = Seen(), Seen()
    tried, lasted = 0, 0.0
    middles, slowest = [], []
    before = processes(run)
    had = held(before)
    with multiprocessing.get_context("spawn").Pool(1, give_way if name in FUZZ else None) as pool:
        await asyncio.to_thread(pool.apply, time.monotonic)
        for _ in range(target.rounds):
            async with callers(client, words) as alone:
                await asyncio.sleep(QUIET_SECONDS)
            began = time.monotonic()
            async with callers(client, words) as beside:
                tried += await asyncio.to_thread(pool.apply, attack, (target,))
            lasted += time.monotonic() - began
            middles.append(beside.middle / alone.middle)
            slowest.append(beside.slowest / alone.slowest)
            quiet.add(alone)
            seen.add(beside)
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        has = held(before)
        files = max((has[pid][0] - had[pid][0] for pid in has), default=0)
        growth = max(has, key=lambda pid: has[pid][1] - had[pid][1])
        if time.monotonic() > until or (files <= 2 and has[growth][1] < had[growth][1] + 5):
            break
        await asyncio.sleep(1.0)
    dead = sorted(kind for pid, kind in before.items() if pid not in processes(run))
    for error in sorted(set(seen.failed))[:5]:
        console.print(f"{name}: {error}")
    return (
        name,
        f"{tried}, {tried / lasted:.0f}/s",
        f"{quiet.rate:.0f} -> {seen.rate:.0f}, {seen.rate / quiet.rate:.2f}",
        f"{quiet.middle * 1e3:.0f} -> {seen.middle * 1e3:.0f}, {statistics.median(middles):.2f}",
        f"{quiet.slowest * 1e3:.0f} -> {seen.slowest * 1e3:.0f}, {statistics.median(slowest):.2f}",
        f"{len(seen.failed)} of {len(seen.failed) + len(seen.seconds)}",
        f"{files:+d}",
        f"{had[growth][1]:.0f} -> {has[growth][1]:.0f} ({before[growth]})",
        ", ".join(dead) or "none",
    )


async def measure(
    config: MIIConfig, attacks: dict[str, Callable[[Target], int]], given: argparse.Namespace, words: int
) -> None:
    """Make the attacks on a deployment that serves, one after the other, and print the table."""
    entry = Registry(config.home).get(config.deployment_name)
    assert entry is not None
    run = RunDir(entry.run_dir)
    ranks = credentials.load_server(run).as_client
    leader = min(pid for pid, kind in processes(run).items() if kind == "engine_process")
    replica = ""
    for listening in psutil.Process(leader).net_connections("tcp"):
        if listening.status == psutil.CONN_LISTEN:
            async with transport.open_channel(f"127.0.0.1:{listening.laddr.port}", ranks) as channel:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(channel.channel_ready(), 2)
                    replica = f"127.0.0.1:{listening.laddr.port}"
    guest = sharing.read(config.home, config.deployment_name)[1]
    target = Target(entry.address, replica, guest, ranks, given.seconds, given.count // given.rounds, given.rounds)
    table = Table(
        "attack",
        "tried",
        "good per s",
        "median ms",
        "slowest ms",
        "failed",
        "files",
        "most grown, MiB",
        "dead",
        width=160,
    )
    async with AsyncMIIClient(config) as client:
        async with callers(client, words):
            await asyncio.sleep(2)
        for name, attack in attacks.items():
            table.add_row(*await attacked(name, attack, client, run, target, words))
    console.print(table)


def main() -> None:
    """Serve, attack, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("what", nargs="*", default=["fuzz", "floods", "guest"], choices=["fuzz", "floods", "guest"])
    options.add_argument("--count", type=int, default=100_000, help="fuzzed messages")
    options.add_argument("--seconds", type=float, default=15.0, help="of every other attack, each time")
    options.add_argument("--rounds", type=int, default=3, help="how often, in turns with callers undisturbed")
    options.add_argument("--model", type=Path, help="a model's folder, for a real engine instead of the echo engine")
    options.add_argument("--only", default="", help="attacks with this in their name")
    given = options.parse_args()
    attacks = {
        name: attack
        for what, several in (("fuzz", FUZZ), ("floods", FLOODS), ("guest", WORST))
        for name, attack in several.items()
        if what in (given.what or [what]) and given.only in name
    }
    # Callers and attackers need a core, too.
    engine: dict[str, Any] = {"threads": 1} if given.model else {"engine": "echo", "echo_delay": 0.005}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)  # the group enters
        client = mii.serve(
            str(given.model or ""),
            deployment_name="hostile",
            replica_num=1 if given.model else 2,
            cluster="local",
            home=Path(folder) / "home",
            share=f"group:{grp.getgrgid(os.getgid()).gr_name}",
            inference_engine_config=engine,
        )
        try:
            asyncio.run(measure(client.mii_config, attacks, given, words=20))
        finally:
            client.terminate_server()


if __name__ == "__main__":
    main()
