"""What the commands print, and how they end: text for people, `--json` for programs, an exit status for scripts."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from typer.core import TyperGroup

from mii_hpc.errors import ConfigError, DeploymentNotFoundError, InvalidRequestError, MIIError
from mii_hpc.printable import printable

BREAKS = "\n\t"
BAD_INPUT, NOT_FOUND, FAILED = 2, 3, 4
"""Exit statuses; 0 is success."""

Name = Annotated[str, typer.Argument(help="The deployment's name, or its model's.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HomeFolder = Annotated[
    Path | None,
    typer.Option("--home", help="Your home of registry and runs; default: $MII_HPC_HOME or ~/.mii_hpc."),
]


class Commands(TyperGroup):
    """The commands; whatever error of ours one raises becomes one sentence and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # one line, as everything that is said
            if logging.lastResort is not None:
                logging.lastResort.setFormatter(logging.Formatter("mii-hpc: %(message)s"))
            try:
                return super().invoke(ctx)
            except MIIError as error:
                tell(str(error))
                raise typer.Exit(status_of(error)) from None


def status_of(error: MIIError) -> int:
    """Return the exit status that an error ends a command with."""
    if isinstance(error, ConfigError | InvalidRequestError):
        return BAD_INPUT
    return NOT_FOUND if isinstance(error, DeploymentNotFoundError) else FAILED


def tell(sentence: str) -> None:
    """Say something on standard error."""
    typer.echo(f"mii-hpc: {printable(sentence, BREAKS)}", err=True)


def say(text: str, nl: bool = True) -> None:
    """Print what others have written, such as an answer; on a terminal, what it would obey is escaped."""
    typer.echo(printable(text, BREAKS) if sys.stdout.isatty() else text, nl=nl)


def show(as_json: bool, data: Any, text: RenderableType) -> None:
    """Print `data` as JSON, or `text` for people."""
    if as_json:
        typer.echo(json.dumps(data, default=str))
    else:
        console().print(printable(text, BREAKS) if isinstance(text, str) else text)


def console() -> Console:
    """Return the standard output, on which brackets are brackets; where it is no terminal, no line is broken."""
    return Console(
        markup=False, highlight=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else 10_000
    )


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a plain table; None is a dash."""
    made = Table(*(header.upper() for header in headers), box=None, pad_edge=False, header_style="bold")
    for row in rows:
        made.add_row(*("-" if cell is None or cell == "" else printable(str(cell)) for cell in row))
    return made


def counted(number: int, noun: str) -> str:
    """Return so many things, such as "1 rank" or "2 ranks"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def duration(seconds: float | None) -> str:
    """Return a duration in its two largest units, such as "2h05m"; a dash when there is none."""
    if seconds is None:
        return "-"
    left = max(0, round(seconds))
    days, left = divmod(left, 86400)
    hours, left = divmod(left, 3600)
    minutes, left = divmod(left, 60)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{left:02}s" if minutes else f"{left}s"


def since(moment: float | None) -> str:
    """Return how long ago a moment was, given in seconds since the epoch."""
    return duration(None if moment is None else time.time() - moment)


def until(moment: float | None) -> str:
    """Return how long it is until a moment, given in seconds since the epoch."""
    return duration(None if moment is None else moment - time.time())


def _show_warning(message: Warning | str, *_args: Any, **_kwargs: Any) -> None:
    tell(f"warning: {message}")
