"""Ending deployments, and clearing away what they have left: `stop`, `prune`."""

from __future__ import annotations

from typing import Annotated

import typer

from mii_hpc.cli.output import AsJson, HomeFolder, Name, counted, show
from mii_hpc.cli.show import client, own_home
from mii_hpc.deployments.lookup import runs_in_use
from mii_hpc.deployments.rundir import RunDir


def stop(name: Name, home: HomeFolder = None, as_json: AsJson = False) -> None:
    """End a deployment; requests that run get a few seconds to finish."""
    with client(name, home) as ending:
        stopped = ending.mii_config.deployment_name
        ending.terminate_server()
    show(as_json, {"deployment_name": stopped, "state": "stopped"}, f"deployment '{stopped}' has ended")


def prune(
    older_than: Annotated[float, typer.Option(help="Days since the run was submitted.", min=0)] = 30.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
) -> None:
    """Remove the run directories, with their logs, of deployments that have ended."""
    own = own_home(home)
    ended = RunDir.ended(own.path, older_than, runs_in_use(own.path))
    for run in ended if not dry_run else ():
        run.remove()
    said = "would be removed" if dry_run else "removed"
    data = {"removed": [] if dry_run else [str(run.path) for run in ended], "ended": [str(run.path) for run in ended]}
    show(as_json, data, "\n".join([*(str(run.path) for run in ended), f"{counted(len(ended), 'run')} {said}"]))
