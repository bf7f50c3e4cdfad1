"""The command line: what the batch scripts in slurm/ need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mii_hpc.config import resolve
from mii_hpc.errors import ConfigError
from mii_hpc.schedulers.slurm import Slurm, own_allocation
from mii_hpc.submission import submit as submission


def prepare(
    model: Annotated[str, typer.Argument(help="Model folder or hub name; may be in --config instead.")] = "",
    config: Annotated[str, typer.Option(help="YAML file with fields of MIIConfig.")] = "",
    name: Annotated[str | None, typer.Option(help="Deployment name; default: from the model's.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="Ranks per replica.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda or cpu.")] = None,
) -> None:
    """Take a deployment's name, make its run directory, and print the directory's path.

    For use inside a batch script, whose ranks then run `python -m mii_hpc.job.rank RUN_DIR`. The job's number of
    tasks (SLURM_NTASKS) gives the number of replicas.
    """
    given: dict[str, Any] = {"deployment_name": name, "tensor_parallel": tensor_parallel, "device": device}
    typer.echo(_prepare(model, config, {key: value for key, value in given.items() if value}))


def _prepare(model: str, config: str, given: dict[str, Any]) -> Path:
    allocation = own_allocation()
    resolved = resolve(model, mii_config=config or None, cluster=Slurm.name, **given)
    if resolved.uptime is not None:
        raise ConfigError(
            f"uptime={resolved.uptime!r}: no job follows one that was submitted with a script of your own; "
            "use mii-hpc serve, or leave it out"
        )
    replicas, left = divmod(allocation.tasks, resolved.model_conf.tensor_parallel)
    if left or not replicas:
        raise ConfigError(
            f"tensor_parallel={resolved.model_conf.tensor_parallel}: does not divide the job's {allocation.tasks} tasks"
        )
    shaped = resolved.model_conf.model_copy(update={"replica_num": replicas})
    checked = submission.check(resolved.model_copy(update={"model_conf": shaped}))
    run, _ = submission.prepare(checked, allocation.job_id)
    return run.path
