"""What weights of 8 and 4 bits cost and gain: `python benchmarks/quantised.py MODEL [--dtype bfloat16] [--rounds 5]`.

Each mode has an engine in a process of its own. Perplexity is that of the prompts' own tokens, in English text of
Python's documentation. A step is timed with so many sequences at once; all modes take turns, and a ratio is taken
within a round.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from rich.table import Table

from benchmarks.engine import PATIENCE, apart, console, loaded_engine, through_engine
from benchmarks.model import TEXTS
from mii_hpc.config import GenerateParamsConfig
from mii_hpc.engine.base import Engine
from mii_hpc.generation import GenerationRequest, Response

MODES = (None, "int8", "fp8", "int4")
SCORED = 8
"""Texts, each from its beginning."""
CHARACTERS = 1200
SHORT, LONG = 2, 18
"""Tokens of an answer: the difference is what is timed."""


def main(
    model: Annotated[str, typer.Argument(help="folder or hub name")],
    dtype: str = "auto",
    rounds: int = 5,
    concurrency: str = "1,16",
    threads: Annotated[int, typer.Option(help="of every engine; 0 is all cores")] = 0,
) -> None:
    """Measure and print memory, perplexity, milliseconds a step, and ratios."""
    threads = threads or len(os.sched_getaffinity(0))
    counts = [int(number) for number in concurrency.split(",")]
    with ExitStack() as stack:
        ways = {mode: stack.enter_context(apart(partial(serving, model, dtype, mode, threads))) for mode in MODES}
        held: dict[str | None, tuple[float, float]] = {mode: way("score", 0) for mode, way in ways.items()}  # type: ignore[misc]
        steps: dict[tuple[str | None, int], list[float]] = {}
        for number in range(rounds):
            for count in counts:
                for mode, way in ways.items() if number % 2 == 0 else reversed(ways.items()):
                    steps.setdefault((mode, count), []).append(way("step", count))  # type: ignore[arg-type]
    table = Table(title=f"{Path(model).name}, {dtype}, {threads} threads")
    for column in ("weights", "MiB", "perplexity", *(f"ms a step, {count} at once" for count in counts)):
        table.add_column(column, justify="right")
    for mode in MODES:
        memory, perplexity = held[mode]
        cells = [f"{memory:.0f} ({memory / held[None][0]:.2f})", f"{perplexity:.2f} ({perplexity / held[None][1]:.3f})"]
        for count in counts:
            ratio = statistics.median(a / b for a, b in zip(steps[mode, count], steps[None, count], strict=True))
            cells.append(f"{statistics.median(steps[mode, count]):.1f} ({ratio:.2f})")
        table.add_row(mode or "plain", *cells)
    console.print(table)


@contextmanager
def serving(model: str, dtype: str, mode: str | None, threads: int) -> Iterator[Callable[..., Any]]:
    """Yield what measures a mode: way("score", 0) is its MiB and perplexity, way("step", n) the ms of n sequences."""
    fields: dict[str, Any] = {
        "model_name_or_path": model,
        "dtype": dtype,
        "quantization_mode": mode,
        "max_length": 1024,
        "inference_engine_config": {"num_blocks": 256, "prefix_sharing": False, "threads": threads},
    }
    told: list[str] = []
    with loaded_engine(told.append, **fields) as engine:

        def way(what: str, count: int) -> Any:
            if what == "step":
                return step(engine, count)
            sentence = next(sentence for sentence in told if sentence.startswith("loaded: "))
            return float(sentence.split()[1]) * 1024, perplexity(engine)

        yield way


def step(engine: Engine, count: int) -> float:
    """Return the milliseconds of a decode step with so many sequences."""
    prompts = [text[:200] for text in TEXTS[:count]]
    short, long = (count * length / through_engine(engine, prompts, length).rate for length in (SHORT, LONG))
    return 1000 * (long - short) / (LONG - SHORT)


def perplexity(engine: Engine) -> float:
    """Return the perplexity of the texts, each beginning with its first token."""
    params = GenerateParamsConfig(max_new_tokens=1, do_sample=False, prompt_logprobs=True)
    values: list[float] = []
    for number, text in enumerate([text for text in TEXTS if len(text) >= CHARACTERS][:SCORED]):
        answers: list[Response] = []
        ended = through(engine, GenerationRequest(f"score-{number}", text[:CHARACTERS], params), answers)
        ended()
        values += [value for answer in answers for value in answer.prompt_logprobs or ()]
    return math.exp(-statistics.fmean(values))


def through(engine: Engine, request: GenerationRequest, answers: list[Response]) -> Callable[[], None]:
    """Submit a request; return what waits for its end."""
    from threading import Event

    done = Event()

    def deliver(item: Response | Exception) -> None:
        if isinstance(item, Exception):
            raise item
        answers.append(item)
        if item.ended:
            done.set()

    engine.submit(request, deliver)

    def wait() -> None:
        if not done.wait(PATIENCE):
            raise TimeoutError("the engine gave no answer")

    return wait


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    typer.run(main)
