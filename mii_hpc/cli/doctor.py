"""What is wrong on this cluster, on this machine and on the nodes: `doctor`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from mii_hpc.cli.checks import Finding, check_all
from mii_hpc.cli.options import nested, takes
from mii_hpc.cli.output import FAILED, AsJson, HomeFolder, counted, show, tell
from mii_hpc.cli.serve import FIELDS
from mii_hpc.config import MIIConfig, resolve
from mii_hpc.deployments.files import tail
from mii_hpc.deployments.rundir import Report, RunDir
from mii_hpc.errors import ConfigError, RegistryError, SubmissionError
from mii_hpc.schedulers import Job, JobState
from mii_hpc.schedulers.slurm import Slurm
from mii_hpc.submission import submit as submission

OPTIONS = [option for option in FIELDS if option.path[0] == "slurm" and option.name != "tasks_per_node"]
WALLTIME = "10"
"""Minutes that the job asks for where the options do not say it: a short job starts soon."""
POLL_SECONDS = 2.0
MEET_SECONDS = 120.0
"""How long the ranks may take to meet once all have begun."""


@takes(OPTIONS)
def doctor(
    on_nodes: Annotated[
        bool, typer.Option("--on-nodes", help="Submit a small job, with the options for Slurm, and report from there.")
    ] = False,
    nodes: Annotated[int, typer.Option(help="With --on-nodes: how many.", min=1)] = 2,
    timeout: Annotated[float, typer.Option(help="With --on-nodes: seconds until the job has reported.", min=0)] = 600,
    home: HomeFolder = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Check this machine, and the nodes of a small job, for what deployments need. Exit status 4: something is wrong.

    The job is submitted and started as a deployment's is; its ranks meet over MPI as those of a deployment do.
    """
    config = _configuration(nodes, {**({"home": home} if home else {}), **nested(OPTIONS, given)})
    findings = list(check_all(config.home, config.slurm.mpi))
    if on_nodes:
        if not Slurm.is_here():
            raise ConfigError("--on-nodes: there is no sbatch on PATH; deployments run on this machine")
        findings += _examine(config, timeout)
    show(as_json, [dataclasses.asdict(each) for each in findings], _text(findings))
    if any(each.state == "bad" for each in findings):
        raise typer.Exit(FAILED)


def _text(findings: Sequence[Finding]) -> str:
    """Return a line for each finding, and below it what mends it."""
    hosts, checks = (max(len(getattr(each, name)) for each in findings) for name in ("host", "check"))
    lines = []
    for each in findings:
        lines.append(f"{each.state:7}  {each.host:{hosts}}  {each.check:{checks}}  {each.found}")
        if each.remedy:
            lines.append(f"{'':{hosts + checks + 11}}  remedy: {each.remedy}")
    return "\n".join(lines)


def _configuration(nodes: int, given: dict[str, Any]) -> MIIConfig:
    """Return the configuration of a deployment of one rank per node, but of two at least."""
    given["slurm"] = {"time": WALLTIME, **given.get("slurm", {}), "tasks_per_node": 2 if nodes == 1 else 1}
    model = {"replica_num": max(nodes, 2), "inference_engine_config": {"engine": "echo"}}
    return resolve(mii_config={"deployment_name": "doctor", "cluster": Slurm.name, "model_config": model, **given})


def _examine(config: MIIConfig, timeout: float) -> Iterator[Finding]:
    """Yield what the ranks of a small job find. What they leave is removed, unless something went wrong."""
    _, placement = submission.shape(config)
    try:
        run = RunDir.create(config)
    except (RegistryError, OSError) as error:
        yield Finding("job", "skipped", f"none was submitted: {error}")
        return
    try:
        job = Slurm().examine(run, config, placement)
    except SubmissionError as error:
        run.remove()
        yield Finding(
            "job",
            "bad",
            "; ".join(str(error).splitlines()),
            "choose with --partition, --account, --qos, --time and --extra",
        )
        return
    tell(f"job {job.id} examines {counted(placement.nodes, 'node')}")
    try:
        state, reports = _reports(run, job, placement.world_size, timeout)
    finally:
        job.cancel()
    missing = placement.world_size - len(reports)
    if missing:
        yield _silence(run, job, state, missing, timeout)
    for report in {report.host: report for report in reports}.values():
        found = [Finding(**each) for each in json.loads(report.findings or "[]")]
        yield from (dataclasses.replace(each, host=report.host) for each in found)
        yield Finding("address", "good", f"other nodes reach it at {report.address}", host=report.host)
    if not missing:
        yield _meeting(reports, config.slurm.mpi)
    if not missing and all(report.met == "yes" for report in reports):
        run.remove()


def _reports(run: RunDir, job: Job, ranks: int, timeout: float) -> tuple[JobState, list[Report]]:
    """Return the reports of all ranks once they are complete, or what there is when no more are to be expected."""
    deadline, all_began = time.monotonic() + timeout, False
    while True:
        state = job.state()
        reports = run.read_reports()
        if len(reports) == ranks and not all_began:
            deadline, all_began = time.monotonic() + MEET_SECONDS, True
        complete = all_began and all(report.met for report in reports)
        if complete or state.phase == "gone" or time.monotonic() > deadline:
            return state, reports
        time.sleep(POLL_SECONDS)


def _silence(run: RunDir, job: Job, state: JobState, missing: int, timeout: float) -> Finding:
    """Return why ranks have not reported."""
    if state.phase == "pending":
        remedy = "ask for what there is: --partition, --account, --qos, --time, --nodes"
        return Finding("job", "bad", f"job {job.id} waits after {timeout:g} s: {state.reason}", remedy)
    lines = [line for path in run.outputs() for line in tail(path).splitlines() if line.strip()]
    said = f"; the last that it said: {lines[-1].strip()}" if lines else ""
    remedy = f"put {run.path.parent.parent} where all nodes see it, or choose another --home"
    if lines:
        remedy = f"see {run.submitit}; --setup and --python say in what the ranks run"
    return Finding("job", "bad", f"job {job.id}: no report from {counted(missing, 'rank')}{said}", remedy, host="")


def _meeting(reports: list[Report], mpi: str) -> Finding:
    failed = next((report for report in reports if report.met != "yes"), None)
    if failed is None:
        return Finding("meeting", "good", f"the {len(reports)} ranks have met over MPI with srun --mpi={mpi}", host="")
    found = failed.met or f"the ranks have not met over MPI within {MEET_SECONDS:.0f} s of srun --mpi={mpi}"
    remedy = "serve with another --mpi, or load the cluster's own MPI library with --setup"
    return Finding("meeting", "bad", found, remedy, host=failed.host)
