"""Asking a deployment: `generate`."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any

import typer

from mii_hpc.cli.options import nested, options_of, takes
from mii_hpc.cli.output import AsJson, HomeFolder, Name, say, show
from mii_hpc.cli.show import client
from mii_hpc.config import GenerateParamsConfig, validate

OPTIONS = [
    option for option in options_of(GenerateParamsConfig, {GenerateParamsConfig: "Request"}) if option.name != "stream"
]


@takes(OPTIONS)
def generate(
    name: Name,
    prompts: Annotated[
        list[str], typer.Argument(help="One or more prompts; - is standard input.", metavar="PROMPT...")
    ],
    timeout: Annotated[float | None, typer.Option(help="Seconds for all answers.", min=0)] = None,
    home: HomeFolder = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Print a deployment's answers to prompts: of a single one as it is made, of several in their order."""
    options = nested(OPTIONS, given)
    validate(GenerateParamsConfig, options)  # before anything is looked up
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    with client(name, home) as asked:
        if not as_json and len(texts) == 1 and options.get("num_return_sequences", "1") == "1":
            for piece in asked.stream(texts[0], timeout=timeout, **options):
                say(piece.generated_text, nl=False)
            return typer.echo()
        answers = asked.generate(texts, timeout=timeout, **options)
    if as_json:
        return show(True, [dataclasses.asdict(answer) for answer in answers], "")
    for answer in answers:
        say(answer.generated_text)
