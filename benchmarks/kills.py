"""What 32 callers see while processes are killed again and again, on the four-node Slurm cluster of the tests.

`python benchmarks/kills.py [--kill engine_process] [--seconds 600] [--every 20]`, as root. Two replicas of two ranks
serve a tiny model in float32. The callers ask for streams and whole answers, greedy and with a seed, with stop strings
and with several answers; each must be, token for token, that of a run which nothing disturbed. Once a minute it prints
what the deployment holds: memory, open files, and what is in the nodes' /dev/shm.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import typer
from rich.console import Console

import mii_hpc as mii
from mii_hpc.clients.asynchronous import AsyncMIIClient
from mii_hpc.generation import Response, joined
from tests.cluster.cluster import Cluster
from tests.models import tiny_model
from tests.processes import command_line

console = Console()
CALLERS = 32
NAME = "kills"
PROMPTS = ["Hello there, how are", "def f(x):\n    return 🙂", "The quick brown fox jumps over", "Für €5 🚀"]
LENGTH = {"max_new_tokens": 200, "ignore_eos": True}
WAYS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"seed": 3},
    {"seed": 4, "num_return_sequences": 2},
    {"seed": 5, "repetition_penalty": 1.2, "logprobs": True},
]

POISONED = "poison"
POISON = "a prompt that kills the engine"
POISONING = f"""
import sys
if "mii_hpc.job.engine_process" in sys.orig_argv:
    import os, signal
    from mii_hpc.rpc import wire
    unpack = wire.unpack_request
    def unpack_or_die(message):
        request = unpack(message)
        if request.prompt == {POISON!r}:
            os.kill(os.getpid(), signal.SIGKILL)
        return request
    wire.unpack_request = unpack_or_die
"""

Tokens = list[tuple[str, tuple[int, ...], str]]


@dataclass
class Request:
    """One way to ask, and what comes of it undisturbed."""

    prompt: str
    options: dict[str, Any]
    expected: Tokens = field(default_factory=list)


@dataclass
class Seen:
    """What the callers have seen. Times are seconds since the start."""

    began: float = field(default_factory=time.monotonic)
    answers: int = 0
    moved: int = 0
    errors: list[str] = field(default_factory=list)
    wrong: list[tuple[Tokens, Tokens]] = field(default_factory=list)
    pause: float = 0.0
    slowest: float = 0.0
    tokens: list[tuple[float, int]] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)

    def now(self) -> float:
        return time.monotonic() - self.began


def tokens_of(answers: list[Response]) -> Tokens:
    return [(str(answer), answer.token_ids, str(answer.finish_reason)) for answer in answers]


async def expect(client: AsyncMIIClient) -> list[Request]:
    """Return the requests with their answers; a stop string is from the middle of what would come without it."""
    requests = [Request(prompt, {**LENGTH, **way}) for prompt in PROMPTS for way in WAYS]

    async def ask(request: Request) -> None:
        request.expected = tokens_of(await client.generate(request.prompt, **request.options))

    await asyncio.gather(*map(ask, requests[::3]))
    for request in requests[::3]:
        text = request.expected[0][0]
        request.options["stop"] = (text[len(text) * 3 // 4 :][:3], text[:2] + "never")
    await asyncio.gather(*map(ask, requests))
    return requests


async def call(client: AsyncMIIClient, requests: list[Request], seen: Seen, seconds: float, number: int) -> None:
    draw = random.Random(number)
    while seen.now() < seconds:
        request = draw.choice(requests)
        began = last = time.monotonic()
        pieces = []
        try:
            if number % 2:
                async for piece in client.stream(request.prompt, timeout=300, **request.options):
                    now = time.monotonic()
                    seen.pause, last = max(seen.pause, now - last), now
                    seen.tokens.append((seen.now(), len(piece.token_ids)))
                    pieces.append(piece)
                answers = joined(pieces)
            else:
                answers = await client.generate(request.prompt, timeout=300, **request.options)
                seen.tokens.append((seen.now(), sum(len(answer.token_ids) for answer in answers)))
        except mii.MIIError as error:
            seen.errors.append(f"{seen.now():.0f} s: {type(error).__name__}: {error}")
            console.print(seen.errors[-1], highlight=False)
            continue
        seen.answers += 1
        seen.moved += answers[-1].migrations > 0
        seen.slowest = max(seen.slowest, time.monotonic() - began)
        if tokens_of(answers) != request.expected:
            seen.wrong.append((tokens_of(answers), request.expected))


async def poison_some(client: AsyncMIIClient, seen: Seen, seconds: float, every: float) -> None:
    """Ask again and again for what kills the engine that gets it."""
    await asyncio.sleep(5)
    while seen.now() < seconds - every / 2:
        before = await replicas_formed(client)
        seen.disturbed.append(seen.now())
        try:
            (answer,) = await client.generate(POISON, timeout=300)
            end = f"answered: {answer}"
        except mii.MIIError as error:
            end = f"{type(error).__name__}: {error}"
        told = seen.now() - seen.disturbed[-1]
        await asyncio.sleep(every)
        lost = await replicas_formed(client) - before
        console.print(f"after {told:.1f} s {end} ({lost} replicas formed again); {progress(seen)}", highlight=False)


async def replicas_formed(client: AsyncMIIClient) -> int:
    """Return how often replicas were formed, once all are ready."""
    while True:
        status = await client.status()
        if status.state == "ready":
            return sum(replica.epoch for replica in status.replicas)
        await asyncio.sleep(0.2)


async def kill_some(cluster: Cluster, modules: list[str], seen: Seen, seconds: float, every: float) -> None:
    """Kill processes of each of the modules, one module after the other."""
    draw = random.Random(0)
    await asyncio.sleep(5)
    minutes = 0
    while seen.now() < seconds - every / 2:
        if seen.now() // 60 > minutes:  # just before a kill, when the last one's victim is back
            minutes = int(seen.now() // 60)
            console.print(f"{await asyncio.to_thread(held, cluster)}; {progress(seen)}", highlight=False)
        module = modules[int(len(modules) * seen.now() / seconds)]
        victims = processes(cluster, module)
        if module == "rank":
            first = {psutil.Process(pid).ppid() for pid in processes(cluster, "balancer")}
            victims = sorted({*victims} - first)
        if victims:
            seen.disturbed.append(seen.now())
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(victims), signal.SIGKILL)
        await asyncio.sleep(every)


def processes(cluster: Cluster, module: str) -> list[int]:
    found = []
    for node in cluster.nodes:
        for pid in cluster.job_processes(node):
            words = command_line(pid)
            # A job's own ranks run in submitit's process, those that have replaced one in their own.
            wanted = {f"mii_hpc.job.{module}", *(["submitit.core._submit"] if module == "rank" else [])}
            if wanted & set(words) and "srun" not in words[0]:
                found.append(pid)
    return sorted(found)


def held(cluster: Cluster) -> str:
    """Say what the deployment's processes, those who call, and the nodes' /dev/shm hold."""
    kinds = {module: processes(cluster, module) for module in ("balancer", "rank", "engine_process")}
    parts = []
    for kind, pids in {**kinds, "callers": [os.getpid()]}.items():
        memory = files = 0
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                memory, files = memory + process.memory_info().rss, files + process.num_fds()
        parts.append(f"{len(pids)} {kind} {memory >> 20} MiB {files} files")
    count = size = 0
    for node in cluster.nodes:
        shown = cluster.run_on(node, ["find", "/dev/shm", "-type", "f", "-printf", "%k\\n"]).stdout.split()
        count, size = count + len(shown), size + sum(map(int, shown))
    return f"{', '.join(parts)}, /dev/shm {count} files {size} KiB"


def progress(seen: Seen) -> str:
    return (
        f"at {seen.now():.0f} s {len(seen.disturbed)} kills, {seen.answers} answers, {seen.moved} moved, "
        f"{len(seen.errors)} failed, {len(seen.wrong)} differ, longest pause {seen.pause:.1f} s"
    )


async def disturb(cluster: Cluster, home: Path, modules: list[str], seconds: float, every: float) -> Seen:
    config = mii.client(NAME, mii_config={"home": home}).mii_config
    async with AsyncMIIClient(config) as client:
        requests = await expect(client)
        seen = Seen()
        calls = [call(client, requests, seen, seconds, number) for number in range(CALLERS)]
        if POISONED in modules:
            disturbing = poison_some(client, seen, seconds, every)
        else:
            disturbing = kill_some(cluster, modules, seen, seconds, every)
        await asyncio.gather(*calls, disturbing)
    return seen


def report(seen: Seen, disturbance: str) -> None:
    generated = sum(count for _, count in seen.tokens)
    console.print(
        f"{len(seen.disturbed)} times {disturbance} in {seen.now():.0f} s: {seen.answers} answers, "
        f"{generated} tokens, {seen.moved} answers moved; {len(seen.errors)} failed, {len(seen.wrong)} differ from the "
        f"undisturbed; longest pause of a stream {seen.pause:.1f} s, slowest answer {seen.slowest:.1f} s",
        highlight=False,
    )
    for got, expected in seen.wrong:
        for (_, ids, why), (_, others, other_why) in zip(got, expected, strict=True):
            same = next((n for n, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), None)
            console.print(f"{len(ids)} tokens ({why}) for {len(others)} ({other_why}); first different: {same}")


def draw_picture(seen: Seen, disturbance: str, path: Path) -> None:
    """Draw tokens/s over time, with what disturbed it; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    counts = [0] * (int(seen.now()) + 1)
    for at, count in seen.tokens:
        counts[int(at)] += count
    figure, axes = pyplot.subplots(figsize=(9, 3))
    axes.plot(counts)
    for at in seen.disturbed:
        axes.axvline(at, color="tab:red", linewidth=0.8)
    axes.set_xlabel(f"seconds; a red line is {disturbance}")
    axes.set_ylabel("tokens/s that callers have got")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", dpi=120)
    console.print(f"{path}", highlight=False)


def serve_and_kill(folder: Path, modules: list[str], seconds: float, every: float) -> Seen:
    with Cluster(folder / "cluster") as cluster:
        os.environ.update(cluster.env)
        model, home = tiny_model(folder / "model"), folder / "home"
        if POISONED in modules:
            (folder / "sitecustomize.py").write_text(POISONING)
            os.environ["PYTHONPATH"] = str(folder)
        client = mii.serve(
            str(model), deployment_name=NAME, home=home, cluster="slurm", tensor_parallel=2, replica_num=2,
            dtype="float32", startup_timeout=400, slurm={"tasks_per_node": 1},
            migration_limit=100,  # on a busy machine a request outlives many kills
        )  # fmt: skip
        seen = asyncio.run(disturb(cluster, home, modules, seconds, every))
        with contextlib.suppress(mii.MIIError):  # what the callers saw of it is reported
            client.terminate_server()
    return seen


def main(
    kill: Annotated[
        str,
        typer.Option(
            help="engine_process, balancer, rank (other than rank 0), or several, one after the other, with commas "
            "between; or poison: a prompt that kills the engine"
        ),
    ] = "engine_process",
    seconds: float = 600,
    every: Annotated[float, typer.Option(help="seconds between two kills")] = 20,
    plot: Path = Path("build/kills.png"),
) -> None:
    """Serve, kill, and print what the callers have seen."""
    with tempfile.TemporaryDirectory(prefix="mii-kills-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        seen = serve_and_kill(folder, kill.split(","), seconds, every)
    report(seen, POISONED if kill == POISONED else f"SIGKILL to {kill}")
    draw_picture(seen, f"a SIGKILL to {kill}", plot)


if __name__ == "__main__":
    typer.run(main)
