"""What passes through one balancer, with engines that need no torch: `python benchmarks/streams.py [--against FOLDER]`.

Engines, balancer and client are a process each, all on two cores. With `--against`, another checkout of this repository
is measured too, in turn with this one, and each figure's ratio is taken between neighbours.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import grpc.aio
import psutil
import typer
from rich.console import Console
from rich.table import Table

from mii_hpc.clients.asynchronous import AsyncMIIClient
from mii_hpc.config import MIIConfig, resolve
from mii_hpc.deployments import credentials
from mii_hpc.deployments.registry import Registry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.deployments.state import DeploymentState
from mii_hpc.engine import create_engine
from mii_hpc.engine.base import EngineSpec
from mii_hpc.job import engine_process
from mii_hpc.job.balancer.balancer import Balancer
from mii_hpc.job.balancer.membership import Replica
from mii_hpc.job.process import collect_garbage
from mii_hpc.submission import submit as submission

CORES = 2
STREAMS = 256
TOKEN_SECONDS = 0.01
CALLERS = 64
ANSWER_SECONDS = 0.3
"""What an answer takes an engine where callers are not to fill the cores, which engines share with what is measured."""

Figures = dict[str, float]


def run_engines(run: RunDir, count: int, told: Connection) -> None:
    """Serve so many engines until the process is ended."""

    async def serve() -> None:
        addresses: asyncio.Queue[str] = asyncio.Queue()

        def tell(**note: str) -> None:
            if "ready" in note:
                addresses.put_nowait(note["ready"])

        spec = EngineSpec.alone(run.load_config().model_conf)
        serving = [engine_process.serve(create_engine(spec), run, "127.0.0.1", True, tell) for _ in range(count)]
        tasks = [asyncio.create_task(each) for each in serving]
        told.send([await addresses.get() for _ in range(count)])
        await asyncio.gather(*tasks, collect_garbage())

    asyncio.run(serve())


def run_balancer(run: RunDir, addresses: list[str], told: Connection) -> None:
    """Serve a balancer in front of the engines until the process is ended."""

    async def serve() -> None:
        keys = credentials.load_server(run)
        balancer = Balancer(run, run.load_config(), keys, run.begin(0))
        for index, address in enumerate(addresses):
            replica = Replica(index, range(index, index + 1), epoch=1, host="localhost")
            await balancer._admit(replica, address)
        told.send(f"127.0.0.1:{await balancer.listen('127.0.0.1:0')}")
        await asyncio.gather(balancer.server.wait_for_termination(), collect_garbage())

    asyncio.run(serve())


class Deployment:
    """Engines and a balancer, whose processes are told apart by what they cost."""

    def __init__(self, home: Path, replicas: int, delay: float) -> None:
        engine = {"engine": "echo", "echo_delay": delay, "max_batch_size": STREAMS}
        self.config: MIIConfig = resolve(
            deployment_name="streams", replica_num=replicas, inference_engine_config=engine, home=home, cluster="local"
        )
        run, entry = submission.prepare(self.config)
        self.processes = {"client": psutil.Process()}
        addresses = self._start("engine", run_engines, run, replicas)
        address = self._start("balancer", run_balancer, run, addresses)
        Registry(home).publish(entry.model_copy(update={"state": DeploymentState.READY, "address": address}))

    def _start(self, name: str, target: Callable[..., None], *args: object) -> Any:
        mine, its = multiprocessing.Pipe()
        process = multiprocessing.Process(target=target, args=(*args, its), daemon=True)
        process.start()
        self.processes[name] = psutil.Process(process.pid)
        if not mine.poll(120):
            raise TimeoutError(f"the {name} did not start")
        return mine.recv()

    def cpu_seconds(self) -> dict[str, float]:
        """Return what each process has used so far."""
        times = {name: process.cpu_times() for name, process in self.processes.items()}
        return {name: used.user + used.system for name, used in times.items()}


@contextmanager
def deployed(replicas: int, delay: float) -> Iterator[Deployment]:
    with tempfile.TemporaryDirectory(prefix="mii-streams-") as folder:
        deployment = Deployment(Path(folder) / "home", replicas, delay)
        try:
            yield deployment
        finally:
            for process in multiprocessing.active_children():
                process.kill()
                process.join()


async def many_streams(deployment: Deployment, seconds: float) -> Figures:
    """A client's streams, each of an engine that makes a token of each every hundredth of a second."""
    messages, tokens = 0, round(seconds / TOKEN_SECONDS)
    read = grpc.aio._call._StreamResponseMixin._read  # type: ignore[attr-defined]

    async def counted(call: Any) -> Any:
        nonlocal messages
        messages += 1
        return await read(call)

    async with AsyncMIIClient(deployment.config) as client:

        async def follow() -> int:
            count = 0
            async for piece in client.stream("to be or not to be", max_new_tokens=tokens):
                count += len(piece.token_ids)
            return count

        await client.generate("warm up")
        grpc.aio._call._StreamResponseMixin._read = counted  # type: ignore[attr-defined]
        before, began = deployment.cpu_seconds(), time.perf_counter()
        total = sum(await asyncio.gather(*(follow() for _ in range(STREAMS))))
        took, after = time.perf_counter() - began, deployment.cpu_seconds()
        grpc.aio._call._StreamResponseMixin._read = read  # type: ignore[attr-defined]
    if total != STREAMS * tokens:
        raise RuntimeError(f"{total} tokens came, of {STREAMS * tokens}")
    figures = {f"{name}: CPU us per token": 1e6 * (after[name] - before[name]) / total for name in after}
    rate = total / took * TOKEN_SECONDS / STREAMS
    return {"tokens/s, of those made": rate, "messages to the client per token": messages / total, **figures}


async def short_requests(
    deployment: Deployment, callers: int, requests: int, streams: bool = False, delay: float = 0.0
) -> Figures:
    """Whole answers of one token, or streams of eight, with so many callers of one client.

    They begin one after the other within `delay`, what a token takes the engine.
    """
    async with AsyncMIIClient(deployment.config) as client:

        async def ask(wait: float = 0.0) -> list[float]:
            await asyncio.sleep(wait)
            took = []
            for _ in range(requests):
                began = time.perf_counter()
                if streams:
                    async for _piece in client.stream("hello", max_new_tokens=8):
                        pass
                else:
                    await client.generate("hello", max_new_tokens=1)
                took.append(time.perf_counter() - began)
            return took

        await ask()
        before = deployment.cpu_seconds()
        every = await asyncio.gather(*(ask(delay * caller / callers) for caller in range(callers)))
        after = deployment.cpu_seconds()
    took = sorted(itertools.chain.from_iterable(every))
    return {
        "ms per request": 1e3 * statistics.median(took),
        "ms per request, p99": 1e3 * took[int(0.99 * len(took))],
        **{f"{name}: CPU us per request": 1e6 * (after[name] - before[name]) / len(took) for name in after},
    }


def measure(seconds: float, many: int) -> Figures:
    """Return all figures, of whichever checkout is imported."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    multiprocessing.set_start_method("spawn")
    with deployed(1, TOKEN_SECONDS) as deployment:
        figures = asyncio.run(many_streams(deployment, seconds))
    for replicas in (2, many):
        with deployed(replicas, 0.0) as deployment:
            for callers, streams in itertools.product((1, CALLERS), (False, True)):
                requests = 400 if callers == 1 else 40
                found = asyncio.run(short_requests(deployment, callers, requests, streams))
                where = f"{callers} {'streams' if streams else 'whole answers'} at once, {replicas} replicas"
                figures |= {f"{where}: {name}": value for name, value in found.items()}
        with deployed(replicas, ANSWER_SECONDS) as deployment:
            found = asyncio.run(short_requests(deployment, CALLERS, 10, delay=ANSWER_SECONDS))
        where = f"{CALLERS} answers of {ANSWER_SECONDS} s at once, {replicas} replicas"
        figures |= {f"{where}: {name}": value for name, value in found.items()}
    return figures


def measured_in(folder: Path, seconds: float, many: int) -> Figures:
    """Return the figures of a checkout, from a process of its own."""
    command = [sys.executable, __file__, "--once", "--seconds", str(seconds), "--many", str(many)]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: Figures = json.loads(printed.splitlines()[-1])
    return figures


def main(
    against: Annotated[Path | None, typer.Option(help="another checkout, to compare with")] = None,
    rounds: int = 3,
    seconds: Annotated[float, typer.Option(help="how long the streams last")] = 10.0,
    many: Annotated[int, typer.Option(help="replicas, to compare with two")] = 128,
    once: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure in turn, and print medians."""
    if once:
        print(json.dumps(measure(seconds, many)))
        return
    here = Path(__file__).resolve().parents[1]
    folders = [here, *([against] if against else [])]
    runs = [[measured_in(folder, seconds, many) for folder in folders] for _ in range(rounds)]
    table = Table("", "here", *(["there", "here / there"] if against else []))
    for name in runs[0][0]:
        values = [statistics.median(run[place][name] for run in runs) for place in range(len(folders))]
        ratios = [statistics.median(run[0][name] / run[1][name] for run in runs)] if against else []
        table.add_row(name, *(f"{value:.4g}" for value in (*values, *ratios)))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
