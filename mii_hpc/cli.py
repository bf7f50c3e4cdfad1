"""The command line: what the batch scripts in slurm/ need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mii_hpc import submission
from mii_hpc.config import resolve
from mii_hpc.errors import MIIError

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Persistent deployments of language models on Slurm clusters."""


@app.command()
def prepare(
    model: Annotated[str, typer.Argument(help="model folder or hub name")] = "",
    config: Annotated[Path | None, typer.Option(help="YAML file with fields of MIIConfig")] = None,
    name: Annotated[str | None, typer.Option(help="deployment name; default: from the model's")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="ranks per replica")] = None,
    replica_num: Annotated[int | None, typer.Option(help="number of replicas")] = None,
    cluster: Annotated[str, typer.Option(help="slurm or local")] = "slurm",
) -> None:
    """Take the deployment's name, make its run directory and print the directory's path.

    For use inside a batch script, whose ranks then run `python -m mii_hpc.job.rank RUN_DIR`.
    """
    given: dict[str, Any] = {"deployment_name": name, "tensor_parallel": tensor_parallel, "replica_num": replica_num}
    try:
        resolved = resolve(
            model, mii_config=config, cluster=cluster, **{k: v for k, v in given.items() if v is not None}
        )
        checked, _ = submission.check(resolved)
        run, _ = submission.prepare(checked)
    except MIIError as error:
        typer.echo(f"mii-hpc: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(run.path)


if __name__ == "__main__":
    app()
