"""Looking at deployments: `ls`, `status`, `wait`, `logs`, `env`."""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mii_hpc import api, schedulers
from mii_hpc.cli.output import AsJson, HomeFolder, Name, duration, show, since, table, until
from mii_hpc.clients.blocking import MIIClient
from mii_hpc.clients.status import DeploymentStatus
from mii_hpc.config import MIIConfig, validate
from mii_hpc.deployments import lookup
from mii_hpc.deployments.files import tail
from mii_hpc.deployments.lookup import Found, Home, OwnHome, SharedHome
from mii_hpc.deployments.registry import Entry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.deployments.state import DeploymentState
from mii_hpc.errors import (
    ConfigError,
    DeploymentFailedError,
    DeploymentNotFoundError,
    DeploymentTimeoutError,
)

POLL_SECONDS = 0.5
SCHEDULER_SECONDS = 10.0
"""How often the scheduler is asked by what waits or follows."""


def client(name: str, home: Path | None) -> MIIClient:
    """Return a client of a running deployment."""
    return api.client(name, {"home": home} if home else None)


def ls(home: HomeFolder = None, as_json: AsJson = False) -> None:
    """List the deployments: your own, and those shared with you (MII_HPC_PATH)."""
    listed = [(each, entry) for each in homes(home) for entry in each.entries()]
    states = [schedulers.state_of(entry, each.is_own) for each, entry in listed]
    data = [
        {**entry.model_dump(mode="json"), "state": state, "home": str(each.path)}
        for (each, entry), state in zip(listed, states, strict=True)
    ]
    rows = [
        (e.deployment_name, e.model, state, e.job_id, e.host, _detail(e, state), since(e.submitted), until(e.ends))
        for (_, e), state in zip(listed, states, strict=True)
    ]
    show(as_json, data, table(("name", "model", "state", "job", "host", "detail", "age", "left"), rows))


def _detail(entry: Entry, state: DeploymentState) -> str:
    if state == DeploymentState.UNRESPONSIVE:
        return f"no sign of life for {since(entry.heartbeat)}"
    return entry.detail if state != DeploymentState.ENDED else ""


def status(
    name: Name,
    metrics: Annotated[bool, typer.Option("--metrics", help="Print the metrics in Prometheus' format.")] = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
) -> None:
    """Show the state of a deployment and of its replicas."""
    with client(name, home) as asked:
        answer = asked.status()
    if metrics:
        try:
            from mii_hpc.gateway.metrics import exposition
        except ImportError as error:
            raise ConfigError(f"--metrics needs '{error.name}': pip install 'mii_hpc[gateway]'") from None
        return show(as_json, {"metrics": exposition(answer).decode()}, exposition(answer).decode())
    heading = f"{answer.deployment_name}: {answer.state}, job {answer.job_id}"
    heading += f", on {answer.host}" if answer.host else ""
    heading += f", {duration(answer.ends - time.time())} left" if answer.ends else ""
    heading += f", then job {answer.successor}" if answer.successor else ""
    heading += f", up for {duration(answer.until - time.time())} more" if answer.until else ""
    if as_json or not answer.replicas:
        return show(as_json, dataclasses.asdict(answer), heading)
    show(False, None, heading)
    show(False, None, replica_table(answer))


def replica_table(answer: DeploymentStatus) -> Any:
    """Return the table of a deployment's replicas."""
    rows = []
    for each in answer.replicas:
        load = each.load
        used = f"{1 - load.free_blocks / load.total_blocks:.0%}" if load and load.total_blocks else None
        counts = (load.running, load.waiting, load.generated_tokens) if load else (None, None, None)
        moved = each.migrations + each.resumed
        told = (each.index, each.state, each.host, each.epoch, each.served, *counts, used, moved, each.lost)
        rows.append((*told, each.detail))
    counted = ("served", "running", "waiting", "tokens", "cache", "moved", "lost")
    return table(("replica", "state", "host", "epoch", *counted, "detail"), rows)


def wait(
    name: Name,
    timeout: Annotated[float | None, typer.Option(help="Give up after this many seconds.", min=0)] = None,
    home: HomeFolder = None,
    as_json: AsJson = False,
) -> None:
    """Wait until a deployment is ready. Exit status 4 if it fails, 3 if there is none of that name."""
    found = lookup.find(name, homes(home), schedulers.is_live)
    deadline = None if timeout is None else time.monotonic() + timeout
    asked = float("-inf")
    while (entry := _entry_of_run(found)).state not in (DeploymentState.READY, DeploymentState.DEGRADED):
        if time.monotonic() > asked + SCHEDULER_SECONDS:
            asked = time.monotonic()
            if not schedulers.is_live(entry, found.home.is_own):
                raise _ended(found)
        if deadline is not None and time.monotonic() > deadline:
            raise DeploymentTimeoutError(
                f"deployment '{entry.deployment_name}' is {entry.state} after --timeout {timeout:g} s"
                + (f" ({entry.detail})" if entry.detail else ""),
                deployment_name=entry.deployment_name,
            )
        time.sleep(POLL_SECONDS)
    data = entry.model_dump(mode="json", include={"deployment_name", "state", "job_id", "host"})
    show(as_json, data, f"deployment '{entry.deployment_name}' is ready: its {entry.job} runs on {entry.host}")


def logs(
    name: Annotated[str, typer.Argument(help="The deployment's name, or its model's; an ended one's name, too.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the deployment has ended.")] = False,
    rank: Annotated[int | None, typer.Option(help="Only what this rank and its engine say.", min=0)] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="Begin with this many last lines of each log.")] = 50,
    home: HomeFolder = None,
    as_json: AsJson = False,
) -> None:
    """Show the logs of a deployment: of all ranks, or of one. With --json, an object per line."""
    run, found = _run_of(name, home)
    read: dict[Path, int] = {}
    last = ""
    while True:
        ended = found is None or (follow and not _is_running(found))
        for path in _logs(run, rank):
            for line in _new_lines(path, read, lines):
                title = f"==> {path.relative_to(run.path)} <=="
                if not as_json and title != last:
                    typer.echo(title)
                    last = title
                show(as_json, {"file": str(path.relative_to(run.path)), "line": line}, line)
        if not follow or ended:
            return
        time.sleep(POLL_SECONDS)


def env(
    name: Name,
    url: Annotated[str, typer.Option(help="Where `mii-hpc gateway` answers, for a deployment without a gateway.")] = "",
    home: HomeFolder = None,
    as_json: AsJson = False,
) -> None:
    """Print shell lines that point OpenAI's clients to a deployment: eval "$(mii-hpc env NAME)".

    They set OPENAI_BASE_URL and OPENAI_API_KEY, and for a gateway in the job SSL_CERT_FILE, so that its certificate,
    and no other, is believed.
    """
    found = lookup.find(name, homes(home), schedulers.is_live)
    base = url or (f"{found.entry.gateway}/v1" if found.entry.gateway else "http://127.0.0.1:8000/v1")
    variables = {"OPENAI_BASE_URL": base, "OPENAI_API_KEY": found.credentials.token}
    if base.startswith("https:"):
        variables["SSL_CERT_FILE"] = str(found.home.certificate(found.entry))
    show(
        as_json,
        variables,
        "\n".join(f"export {variable}={shlex.quote(value)}" for variable, value in variables.items()),
    )


def own_home(home: Path | None) -> OwnHome:
    """Return the user's own home: the one given, or the default."""
    return OwnHome(validate(MIIConfig, {"home": home} if home else {}).home)


def homes(home: Path | None) -> list[Home]:
    """Return where deployments are looked for: the user's own home, then those in MII_HPC_PATH."""
    shared = [SharedHome(Path(path).expanduser()) for path in os.environ.get("MII_HPC_PATH", "").split(":") if path]
    return [own_home(home), *shared]


def _entry_of_run(found: Found) -> Entry:
    """Return the entry as it is now. Raises DeploymentFailedError when the run has the name no longer."""
    try:
        entry = found.home.get(found.entry.deployment_name).entry
    except DeploymentNotFoundError:
        raise _ended(found) from None
    if entry.fingerprint != found.entry.fingerprint:
        raise _ended(found)
    return entry


def _ended(found: Found) -> DeploymentFailedError:
    entry = found.entry
    failure = RunDir(entry.run_dir).read_failure() if found.home.is_own else None
    return DeploymentFailedError(
        f"deployment '{entry.deployment_name}' ({entry.job}) has ended before it was ready"
        + (f": {failure.message}" if failure else ""),
        deployment_name=entry.deployment_name,
        job_id=entry.job_id,
        log=failure.log if failure else "",
    )


def _run_of(name: str, home: Path | None) -> tuple[RunDir, Found | None]:
    """Return the run directory of a deployment, or else that of the last one that had this name."""
    own = own_home(home)
    try:
        found = own.find(name)
    except DeploymentNotFoundError:
        ended = [run for run in RunDir.all(own.path) if run.deployment_name == name]
        if not ended:
            raise
        return ended[-1], None
    return RunDir(found.entry.run_dir), found


def _is_running(found: Found) -> bool:
    try:
        return schedulers.is_live(_entry_of_run(found), found.home.is_own)
    except DeploymentFailedError:
        return False


def _logs(run: RunDir, rank: int | None) -> list[Path]:
    if rank is None:
        return sorted([*run.submitit.glob("*.out"), *run.submitit.glob("*.err"), *run.logs.glob("*.log")])
    world = run.load_config().model_conf.world_size
    if rank >= world:
        raise ConfigError(f"--rank {rank}: the deployment has ranks 0 to {world - 1}")
    return [path for path in (run.rank_log(rank), run.engine_log(rank)) if path.exists()]


def _new_lines(path: Path, read: dict[Path, int], lines: int) -> Iterator[str]:
    """Yield what was added to a log since it was read; the first time, its last lines."""
    if path not in read:
        size = path.stat().st_size
        read[path] = size
        yield from (tail(path, size).splitlines()[-lines:] if lines else ())
        return
    with path.open("rb") as file:
        file.seek(read[path])
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    read[path] += len(whole)
    yield from whole.decode(errors="replace").splitlines()
