"""The HTTP face on this machine: `gateway`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from mii_hpc import schedulers
from mii_hpc.cli.output import HomeFolder, Name, tell
from mii_hpc.cli.show import homes
from mii_hpc.deployments import lookup
from mii_hpc.errors import ConfigError


def gateway(
    name: Name,
    port: Annotated[int, typer.Option(help="The port on 127.0.0.1; 0 takes any free one.", min=0, max=65535)] = 8000,
    socket: Annotated[Path | None, typer.Option(help="A Unix socket to listen at, instead of a port.")] = None,
    home: HomeFolder = None,
) -> None:
    """Answer the OpenAI API on this machine, for a deployment wherever it runs, until Ctrl-C.

    The API key is the deployment's token; `mii-hpc env NAME` prints both. When the deployment is started again, under
    the same name, the gateway follows.
    """
    try:
        from mii_hpc.gateway.server import Listening, serve
    except ImportError as error:
        raise ConfigError(f"the gateway needs '{error.name}': pip install 'mii_hpc[gateway]'") from None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    found = lookup.find(name, homes(home), schedulers.is_live)
    listening = Listening(port=port, path=socket)
    serve(found.entry.deployment_name, found.home, listening, lambda address: tell(f"answering at {address}"))
