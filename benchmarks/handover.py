"""What 32 callers see while one job after the other takes a deployment's name, on the Slurm cluster of the tests.

`python benchmarks/handover.py [--engine echo] [--seconds 300] [--walltime 2]`, as root. Two replicas serve with a
walltime of minutes and an uptime beyond it. The callers are those of kills.py; each answer must be, token for token,
that of a run which nothing disturbed, and the name must be in the registry all the time.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

import mii_hpc as mii
from benchmarks.kills import CALLERS, NAME, Seen, call, console, draw_picture, expect, report
from mii_hpc.clients.asynchronous import AsyncMIIClient
from mii_hpc.deployments.registry import Registry
from tests.cluster.cluster import Cluster
from tests.models import tiny_model

MARGIN_MINUTES = 3
"""How much longer the uptime is than the callers go on."""


async def watch(home: Path, seen: Seen, seconds: float) -> list[str]:
    """Look at the registry ten times a second; return what was seen there, at each change."""
    changes: list[str] = []
    last: tuple[str, ...] = ()
    while seen.now() < seconds:
        entry = Registry(home).get(NAME)
        found = (entry.job_id, entry.state, entry.successor) if entry else ("nothing",)
        if found != last:
            if last and last[0] != found[0]:
                seen.disturbed.append(seen.now())
            last = found
            then = f", then job {entry.successor}" if entry and entry.successor else ""
            words = f"job {entry.job_id}, {entry.state}{then}" if entry else "nothing"
            changes.append(f"{seen.now():.0f} s: {words}")
        await asyncio.sleep(0.1)
    return changes


async def disturb(home: Path, seconds: float) -> tuple[Seen, list[str]]:
    async with AsyncMIIClient(mii.client(NAME, mii_config={"home": home}).mii_config) as client:
        requests = await expect(client)
        seen = Seen()
        calls = [call(client, requests, seen, seconds, number) for number in range(CALLERS)]
        watching = asyncio.create_task(watch(home, seen, seconds))
        await asyncio.gather(*calls)
    return seen, await watching


def serve_on(folder: Path, engine: str, seconds: float, walltime: int, handover: float) -> tuple[Seen, list[str]]:
    with Cluster(folder / "cluster") as cluster:
        os.environ.update(cluster.env)
        home = folder / "home"
        uptime = int(seconds / 60) + MARGIN_MINUTES
        shape: dict[str, Any] = {"replica_num": 2, "tensor_parallel": 2, "dtype": "float32"}
        shape["inference_engine_config"] = {"engine": engine, "echo_delay": 0.02}
        model = str(tiny_model(folder / "model")) if engine != "echo" else ""
        client = mii.serve(
            model, deployment_name=NAME, home=home, cluster="slurm", startup_timeout=400, uptime=f"{uptime}",
            handover=handover, slurm={"tasks_per_node": 2, "time": f"{walltime}"}, **shape,
        )  # fmt: skip
        try:
            return asyncio.run(disturb(home, seconds))
        finally:
            began = time.monotonic()
            client.terminate_server()
            while any(cluster.job_processes(node) for node in cluster.nodes) and time.monotonic() < began + 60:
                time.sleep(0.2)
            left = [job for job in cluster.squeue() if job.state not in ("COMPLETED", "CANCELLED", "TIMEOUT")]
            console.print(f"{time.monotonic() - began:.0f} s after terminate_server() these jobs are left: {left}")
            for log in sorted((home / "runs").glob("*/logs/balancer.log")) if os.environ.get("MII_HPC_LOG") else ():
                console.print(log.read_text(), highlight=False)


def main(
    engine: Annotated[str, typer.Option(help="echo or deepspeed")] = "deepspeed",
    seconds: float = 300,
    walltime: Annotated[int, typer.Option(help="minutes")] = 2,
    handover: Annotated[float, typer.Option(help="seconds before its end")] = 40,
    plot: Path = Path("build/handover.png"),
) -> None:
    """Serve, hand over, and print what the callers have seen."""
    with tempfile.TemporaryDirectory(prefix="mii-handover-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        seen, changes = serve_on(folder, engine, seconds, walltime, handover)
    for change in changes:
        console.print(change, highlight=False)
    report(seen, "another job has the name")
    draw_picture(seen, "when another job has the name", plot)


if __name__ == "__main__":
    typer.run(main)
