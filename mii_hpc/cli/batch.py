"""Many requests from a file: `batch`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mii_hpc import api, schedulers
from mii_hpc.cli.options import takes
from mii_hpc.cli.output import FAILED, AsJson, show
from mii_hpc.cli.serve import FIELDS, Assignments, ConfigFile, configuration
from mii_hpc.cli.show import homes
from mii_hpc.clients.asynchronous import AsyncMIIClient
from mii_hpc.config import MIIConfig
from mii_hpc.deployments import lookup
from mii_hpc.deployments.lookup import Home
from mii_hpc.errors import ConfigError

if TYPE_CHECKING:
    from mii_hpc.gateway.batch import Batch


@takes(FIELDS)
def batch(
    source: Annotated[Path, typer.Option("--input", "-i", help="Requests as OpenAI's batches have them, a line each.")],
    answers: Annotated[Path, typer.Option("--output", "-o", help="The answers, a line each, as they come.")],
    name: Annotated[str, typer.Argument(help="A running deployment's name, or its model's.")] = "",
    model: Annotated[str, typer.Option(help="Instead of NAME: a model to serve until the batch is done.")] = "",
    config: ConfigFile = None,
    assignments: Assignments = None,
    errors: Annotated[
        Path | None, typer.Option(help="Where errors go, a line each; default: OUTPUT with .errors before its suffix.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.", min=1)] = 256,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Run a file of requests, in any order. Run again after whatever stop, it does only what is not done yet.

    Instead of NAME, --model or --config, with the options of serve, say what to serve until the batch is done.
    Exit status 4 when a request has failed; its error is in a file of its own, and counts as done.
    """
    if bool(name) == bool(model or config):
        raise ConfigError("name, --model, --config: give a running deployment's name, or what to serve")
    from mii_hpc.gateway.batch import Batch

    work = Batch(source, answers, errors or answers.with_suffix(f".errors{answers.suffix}"))
    if name:
        found = lookup.find(name, homes(given["home"]), schedulers.is_live)
        _run(work, found.entry.deployment_name, found.home, concurrency)
    else:
        serving = configuration(model, config, assignments, {**given, "wait": None})
        with api.serve(mii_config=serving) as client:
            try:
                _run(work, client.mii_config.deployment_name, lookup.OwnHome(client.mii_config.home), concurrency)
            finally:
                client.terminate_server()
    done = work.progress
    said = f"{done.answered} answered, {done.failed} failed, {done.earlier} done before; {done.total} in all"
    show(as_json, dataclasses.asdict(done), said)
    if done.failed:
        raise typer.Exit(FAILED)


def _run(work: Batch, name: str, home: Home, concurrency: int) -> None:
    from mii_hpc.gateway.model import ServedModel

    async def run() -> None:
        async with AsyncMIIClient(MIIConfig(deployment_name=name, home=home.path), home=home) as client:
            with _bar(work) as advance:
                await work.run(ServedModel(client, home), concurrency, lambda _: advance())

    try:
        asyncio.run(run())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


@contextlib.contextmanager
def _bar(work: Batch) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("requests", total=work.progress.total, completed=work.progress.earlier)
        yield lambda: progress.advance(task)
