"""What serving costs and gains, side by side in one run: `python benchmarks/engine.py [MODEL] [--rounds 3]`.

Every round takes each way to generate once at each concurrency, so that all of them see the same machine. A ratio
is taken within a round; the table has the medians over the rounds. Greedy answers of a fixed length.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, NamedTuple

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "100000")  # as deployments have it; for the others here too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

import mii_hpc as mii
from benchmarks.model import TEXTS, random_llama
from mii_hpc.clients.asynchronous import AsyncMIIClient
from mii_hpc.config import GenerateParamsConfig, ModelConfig
from mii_hpc.engine import create_engine
from mii_hpc.engine.base import Engine, EngineSpec
from mii_hpc.generation import GenerationRequest, Response

console = Console()
PATIENCE = 600.0
SHARE = 0.2
"""Of a GPU's free memory, for each of those that take what there is: all are on it at once."""


class Measured(NamedTuple):
    """Generated tokens per second, and the median of the seconds to a request's first token, if it shows."""

    rate: float
    first: float | None = None


Way = Callable[..., Measured]
"""Generates so many tokens for each of the prompts, all at once: way(prompts, new_tokens)."""


class Series(NamedTuple):
    """One way to generate."""

    name: str
    way: Way


RATIOS = (
    ("b client", "a engine"),
    ("b client, streams", "a engine, streams"),
    ("c2 two replicas", "c1 one replica"),
    ("a engine", "e generate_batch"),
    ("a engine", "d generate"),
    ("a engine", "f engine, no graphs"),
)


def main(
    model: Annotated[str, typer.Argument(help="folder or hub name; empty makes a random 250M Llama")] = "",
    rounds: int = 3,
    new_tokens: int = 64,
    concurrency: str = "1,4,16,64",
    threads: Annotated[int, typer.Option(help="of every engine but those of one thread; 0 is all cores")] = 0,
    only: Annotated[str, typer.Option(help="letters of the ways to take, such as 'ade'")] = "abcdef",
    plot: Path = Path("build/benchmark.png"),
) -> None:
    """Measure and print tokens/s, time to first token, and ratios."""
    threads = threads or len(os.sched_getaffinity(0))
    counts = [int(number) for number in concurrency.split(",")]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mii-bench-")))
        if not model:
            console.print("making a random Llama of 250M weights")
            model = str(random_llama(scratch / "llama-250m"))
        # All rounds have the same prompts, and what is measured is how fast they are computed.
        options: dict[str, Any] = {"threads": threads, "prefix_sharing": False}
        if torch.cuda.is_available():
            options["memory_fraction"] = SHARE
        one_thread = {**options, "threads": 1}
        series: list[Series] = []
        if "a" in only:
            engine = stack.enter_context(apart(partial(running_engine, model, options)))
            series.append(Series("a engine", engine))
            series.append(Series("a engine, streams", partial(engine, stream=True)))
        if "b" in only:
            served = stack.enter_context(deployment(scratch, "b", model, 1, options))
            series.append(Series("b client", served))
            series.append(Series("b client, streams", partial(served, stream=True)))
        if "c" in only:
            single = stack.enter_context(deployment(scratch, "c1", model, 1, one_thread))
            double = stack.enter_context(deployment(scratch, "c2", model, 2, one_thread))
            series.append(Series("c1 one replica", single))
            # Each of the two has as many requests as the one has.
            series.append(Series("c2 two replicas", lambda prompts, length: double(prompts * 2, length)))
        if "d" in only:
            series.append(Series("d generate", stack.enter_context(apart(partial(padded, model, threads)))))
        if "e" in only:
            series.append(Series("e generate_batch", stack.enter_context(apart(partial(continuous, model, threads)))))
        if "f" in only and torch.cuda.is_available():
            without = stack.enter_context(apart(partial(running_engine, model, {**options, "cuda_graphs": False})))
            series.append(Series("f engine, no graphs", without))
        results = measure(series, counts, rounds, new_tokens)
    report(series, counts, results, plot, f"{Path(model).name}, {threads} threads, {new_tokens} tokens an answer")


def measure(
    series: list[Series], counts: list[int], rounds: int, new_tokens: int
) -> dict[tuple[str, int], list[Measured]]:
    """Return for each series and concurrency one measurement per round."""
    words = " ".join(TEXTS).split()
    # Prompts of 8 to 47 words, no two of them alike.
    prompts = [" ".join(words[100 * i : 100 * i + 8 + 7 * i % 40]) for i in range(max(counts))]
    results: dict[tuple[str, int], list[Measured]] = {}
    for entry in series:
        entry.way(prompts[: max(counts)], 4)  # warm
    for number in range(rounds):
        for count in counts:
            for entry in series if number % 2 == 0 else reversed(series):
                with console.status(f"round {number + 1} of {rounds}: {count} at once, {entry.name}"):
                    results.setdefault((entry.name, count), []).append(entry.way(prompts[:count], new_tokens))
    return results


def report(
    series: list[Series], counts: list[int], results: dict[tuple[str, int], list[Measured]], plot: Path, title: str
) -> None:
    """Print the table and draw the plot."""
    names = [entry.name for entry in series]

    def ratio(name: str, other: str, count: int) -> str:
        pairs = zip(results[name, count], results[other, count], strict=True)
        return f"{statistics.median(mine.rate / theirs.rate for mine, theirs in pairs):.2f}"

    table = Table(title=title)
    table.add_column("tokens/s (seconds to first token)")
    for count in counts:
        table.add_column(f"{count} at once", justify="right")
    for name in names:
        cells = []
        for count in counts:
            rate = statistics.median(one.rate for one in results[name, count])
            firsts = [one.first for one in results[name, count] if one.first is not None]
            cells.append(f"{rate:.1f}" + (f" ({statistics.median(firsts):.2f})" if firsts else ""))
        table.add_row(name, *cells)
    table.add_section()
    for name, other in RATIOS:
        if name in names and other in names:
            table.add_row(f"{name} / {other}", *(ratio(name, other, count) for count in counts))
    console.print(table)
    draw(names, counts, results, plot, title)


def draw(
    names: list[str], counts: list[int], results: dict[tuple[str, int], list[Measured]], plot: Path, title: str
) -> None:
    """Save tokens/s against concurrency as a picture."""
    try:
        from matplotlib import pyplot
    except ImportError:
        console.print("no plot: pip install matplotlib")
        return
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    for name in names:
        rates = [statistics.median(one.rate for one in results[name, count]) for count in counts]
        axes.plot(counts, rates, marker="o", label=name)
    axes.set(xscale="log", xlabel="requests at once", ylabel="tokens/s", title=title)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.legend()
    axes.grid(alpha=0.3)
    plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(plot, dpi=120, bbox_inches="tight")
    console.print(f"plot: {plot}")


@contextmanager
def apart(make: Callable[[], AbstractContextManager[Way]]) -> Iterator[Way]:
    """One way to generate, in a process of its own: in one process, all would have OpenMP's threads in their way."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=obey, args=(make, theirs))
    process.start()
    theirs.close()

    def way(*args: Any, **options: Any) -> Measured:
        ours.send((args, options))
        if not ours.poll(PATIENCE):
            raise TimeoutError("no answer")
        answer: Measured = ours.recv()
        return answer

    try:
        yield way
    finally:
        ours.close()
        process.join(PATIENCE)
        process.kill()


def obey(make: Callable[[], AbstractContextManager[Way]], commands: Connection) -> None:
    """Generate as told, until the pipe closes."""
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    with make() as way, suppress(EOFError):
        while True:
            args, options = commands.recv()
            commands.send(way(*args, **options))


@contextmanager
def running_engine(model: str, options: dict[str, Any]) -> Iterator[Way]:
    """(a): straight into an engine."""
    with loaded_engine(model_name_or_path=model, inference_engine_config=options) as engine:
        yield partial(through_engine, engine)


@contextmanager
def loaded_engine(progress: Callable[[str], None] = lambda _: None, **fields: Any) -> Iterator[Engine]:
    """Run an engine on a thread of its own; `fields` are those of ModelConfig."""
    config = ModelConfig(**fields)
    engine = create_engine(EngineSpec.alone(config))
    loaded: Future[None] = Future()

    def work() -> None:
        try:
            engine.load(progress)
        except Exception as error:
            loaded.set_exception(error)
            raise
        loaded.set_result(None)
        engine.run()

    thread = threading.Thread(target=work)
    thread.start()
    loaded.result()
    try:
        yield engine
    finally:
        engine.close()
        thread.join()


def through_engine(engine: Engine, prompts: list[str], new_tokens: int, stream: bool = False) -> Measured:
    """Submit the prompts to an engine and wait for all answers."""
    params = GenerateParamsConfig(max_new_tokens=new_tokens, do_sample=False, ignore_eos=True, stream=stream)
    firsts: dict[int, float] = {}
    open_requests = threading.Semaphore(0)
    generated = 0

    def deliver_to(number: int) -> Callable[[Response | Exception], None]:
        def deliver(item: Response | Exception) -> None:
            nonlocal generated
            firsts.setdefault(number, time.perf_counter() - start)
            if isinstance(item, Exception) or item.ended:
                generated += 0 if isinstance(item, Exception) else item.generated_length
                open_requests.release()

        return deliver

    start = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(f"{start}-{number}", prompt, params), deliver_to(number))
    for _ in prompts:
        if not open_requests.acquire(timeout=PATIENCE):
            raise TimeoutError("the engine gave no answer")
    rate = generated / (time.perf_counter() - start)
    return Measured(rate, statistics.median(firsts.values()) if stream else None)


@contextmanager
def deployment(
    home: Path, name: str, model: str, replicas: int, options: dict[str, Any]
) -> Iterator[Callable[..., Measured]]:
    """A deployment on this machine, and what measures it through its client and balancer."""
    console.print(f"serving '{name}': {replicas} replicas")
    client = mii.serve(
        model,
        deployment_name=name,
        replica_num=replicas,
        cluster="local",
        home=home,
        inference_engine_config=options,
    )
    try:
        with asyncio.Runner() as runner:
            caller = AsyncMIIClient(client.mii_config)
            yield lambda prompts, new_tokens, stream=False: runner.run(
                through_client(caller, prompts, new_tokens, stream)
            )
            runner.run(caller.close())
    finally:
        client.terminate_server()


async def through_client(client: AsyncMIIClient, prompts: list[str], new_tokens: int, stream: bool) -> Measured:
    """(b) and (c): through client and balancer."""
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "ignore_eos": True}
    start = time.perf_counter()
    if not stream:
        answers = await client.generate(prompts, timeout=PATIENCE, **options)
        return Measured(sum(answer.generated_length for answer in answers) / (time.perf_counter() - start))

    async def one(prompt: str) -> tuple[float, int]:
        first, length = 0.0, 0
        async for piece in client.stream(prompt, timeout=PATIENCE, **options):
            first = first or time.perf_counter() - start
            length = piece.generated_length
        return first, length

    firsts, lengths = zip(*await asyncio.gather(*map(one, prompts)), strict=True)
    return Measured(sum(lengths) / (time.perf_counter() - start), statistics.median(firsts))


@contextmanager
def padded(model: str, threads: int) -> Iterator[Way]:
    """(d): transformers' `generate` on one padded batch."""
    module, tokenizer = plain(model, threads)

    def way(prompts: list[str], new_tokens: int) -> Measured:
        firsts: list[float] = []

        class Note(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                firsts.append(time.perf_counter() - start)
                return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        start = time.perf_counter()
        batch = tokenizer(prompts, padding=True, return_tensors="pt").to(module.device)
        criteria = StoppingCriteriaList([Note()])
        module.generate(**batch, generation_config=_greedy(new_tokens), stopping_criteria=criteria)
        return Measured(len(prompts) * new_tokens / (time.perf_counter() - start), firsts[0])

    yield way


@contextmanager
def continuous(model: str, threads: int) -> Iterator[Way]:
    """(e): transformers' own continuous batching. What it prepares for each call is not counted."""
    module, tokenizer = plain(model, threads)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    # On CPU the sizes that it chooses by itself make it several times slower.
    on_cpu = {"num_blocks": 64, "page_size": 32, "max_batch_tokens": 256}
    sizes: dict[str, Any] = {"max_memory_percent": SHARE} if torch.cuda.is_available() else on_cpu

    def way(prompts: list[str], new_tokens: int) -> Measured:
        attention = module.config._attn_implementation
        start = time.perf_counter()
        outputs = module.generate_batch(
            [tokenizer(prompt)["input_ids"] for prompt in prompts],
            generation_config=_greedy(new_tokens),
            continuous_batching_config=ContinuousBatchingConfig(**sizes, auto_switch_to_flash=False),
            progress_bar=False,
            persistent_manager=True,
            record_timestamps=True,
        )
        elapsed = time.perf_counter() - start
        module.set_attn_implementation(attention)
        times = [output.timestamps for output in outputs.values() if output.timestamps]
        count = sum(len(output.generated_tokens) for output in outputs.values())
        first = statistics.median(stamps[0] - start for stamps in times) if times else None
        return Measured(count / elapsed, first)

    yield way


def plain(model: str, threads: int) -> tuple[Any, Any]:
    """Return the model and its tokenizer, without anything of ours."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return module, tokenizer


def _greedy(new_tokens: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    typer.run(main)
