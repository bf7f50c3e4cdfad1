"""The command line's entry: every command, by its group."""

from __future__ import annotations

from typing import Annotated

import typer

from mii_hpc import __version__
from mii_hpc.cli.ask import generate
from mii_hpc.cli.batch import batch
from mii_hpc.cli.chat import chat
from mii_hpc.cli.doctor import doctor
from mii_hpc.cli.gateway import gateway
from mii_hpc.cli.manage import prune, stop
from mii_hpc.cli.output import Commands
from mii_hpc.cli.prepare import prepare
from mii_hpc.cli.serve import serve
from mii_hpc.cli.show import env, logs, ls, status, wait
from mii_hpc.cli.top import top

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mii-hpc {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Persistent deployments of language models on Slurm clusters.

    Exit status: 0 done, 2 bad input, 3 not found, 4 failed.
    """


for command in (serve, ls, status, wait, logs, generate, chat, batch, gateway, env, top, stop, prune, doctor, prepare):
    app.command()(command)
