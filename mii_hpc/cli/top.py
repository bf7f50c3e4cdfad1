"""A live view of a deployment: `top`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from mii_hpc.cli.output import AsJson, HomeFolder, Name, console, show, table, until
from mii_hpc.cli.show import client
from mii_hpc.clients.status import DeploymentStatus, ReplicaStatus
from mii_hpc.generation import LATENCY_BOUNDS, Histogram, Load

COLUMNS = {
    "replica": "replica",
    "state": "state",
    "host": "host",
    "running": "running",
    "waiting": "waiting",
    "tokens_in": "in/s",
    "tokens_out": "out/s",
    "first_token_p50": "first p50",
    "first_token_p95": "first p95",
    "cache": "cache",
    "prefix_hits": "hits",
    "moved": "moved",
    "lost": "lost",
    "epoch": "epoch",
}


def top(
    name: Name,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 2.0,
    count: Annotated[int | None, typer.Option("--count", "-n", help="Leave after so many looks.", min=1)] = None,
    home: HomeFolder = None,
    as_json: AsJson = False,
) -> None:
    """Watch a deployment's replicas, until Ctrl-C: requests, tokens per second, latencies, the caches, the time left.

    What is per second is since the last look. Latencies are those of requests that stream, in seconds, rounded up to a
    bound of their histogram. With --json, a list of replicas for each look.
    """
    before: Mapping[int, Load] = {}
    looked = time.monotonic()
    with client(name, home) as asked, Live(console=console(), auto_refresh=False, transient=as_json) as live:
        for look in itertools.count(1):
            answer = asked.status()
            now = time.monotonic()
            rows = [_row(each, before.get(each.index), now - looked) for each in answer.replicas]
            if as_json:
                show(True, rows, "")
            else:
                live.update(_view(answer, rows), refresh=True)
            if look == count:
                return
            before, looked = {each.index: each.load for each in answer.replicas if each.load}, now
            time.sleep(interval)


def _row(replica: ReplicaStatus, before: Load | None, seconds: float) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"replica": replica.index, "state": replica.state, "host": replica.host, "epoch": replica.epoch}
    row |= {"moved": replica.migrations + replica.resumed, "lost": replica.lost}
    if (load := replica.load) is None:
        return row
    row |= {"running": load.running, "waiting": load.waiting}
    if load.total_blocks:
        row["cache"] = round(1 - load.free_blocks / load.total_blocks, 3)
    if load.prefix_queries:
        row["prefix_hits"] = round(load.prefix_hits / load.prefix_queries, 3)
    if before is not None and seconds > 0:
        row["tokens_in"] = round((load.prompt_tokens - before.prompt_tokens) / seconds, 1)
        row["tokens_out"] = round((load.generated_tokens - before.generated_tokens) / seconds, 1)
    for name, part in (("first_token_p50", 0.5), ("first_token_p95", 0.95)):
        row[name] = quantile(load.time_to_first_token, LATENCY_BOUNDS, part)
    return row


def quantile(observed: Histogram, bounds: tuple[float, ...], part: float) -> float | None:
    """Return the bound up to which at least this part of the values fell; None when there are none, or beyond all."""
    total = 0
    for bound, count in zip(bounds, observed.counts, strict=False):
        total += count
        if total and total >= part * sum(observed.counts):
            return bound
    return None


def _view(answer: DeploymentStatus, rows: list[dict[str, Any]]) -> Group:
    heading = f"{answer.deployment_name}: {answer.state}, job {answer.job_id}, {until(answer.ends)} left"
    shares = ("cache", "prefix_hits")
    cells = [[f"{row[k]:.0%}" if k in shares and row[k] is not None else row[k] for k in COLUMNS] for row in rows]
    return Group(Text(heading), table(list(COLUMNS.values()), cells))
