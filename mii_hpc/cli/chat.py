"""A conversation in the terminal: `chat`."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from mii_hpc.cli.ask import OPTIONS
from mii_hpc.cli.options import assignment, nested, takes
from mii_hpc.cli.output import HomeFolder, Name, say, tell
from mii_hpc.cli.show import client
from mii_hpc.clients.blocking import MIIClient
from mii_hpc.config import GenerateParamsConfig, validate
from mii_hpc.errors import ConfigError, InvalidRequestError, RequestError
from mii_hpc.generation import Chat

HELP = """\
/reset          begin anew
/undo           forget the last question and its answer
/retry          ask the last question again
/system TEXT    set the system message, and begin anew
/set NAME=VALUE set an option, such as temperature=0.2
/options        show the options
/help           show this
/exit           leave, as Ctrl-D does; Ctrl-C stops an answer"""


@takes(OPTIONS)
def chat(
    name: Name,
    system: Annotated[str, typer.Option(help="The system message.")] = "",
    home: HomeFolder = None,
    **given: Any,
) -> None:
    """Talk with a deployment. Its model's chat template makes the prompts. /help lists the commands."""
    options = nested(OPTIONS, given)
    validate(GenerateParamsConfig, options)
    with client(name, home) as asked:
        Conversation(asked, system, options).hold()


class Conversation:
    """A conversation with a deployment, at the terminal or from standard input."""

    def __init__(self, asked: MIIClient, system: str, options: dict[str, Any]) -> None:
        self._client, self._options = asked, options
        self._system = system
        self._messages: list[dict[str, str]] = []

    def hold(self) -> None:
        """Read what the user says, and answer, until they leave."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() edits lines with it)
        while True:
            try:
                said = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                typer.echo()
                continue
            if said in ("/exit", "/quit"):
                return
            try:
                if said.startswith("/"):
                    self._obey(*said[1:].partition(" ")[::2])
                elif said:
                    self._ask(said)
            except (ConfigError, RequestError) as error:
                tell(str(error))

    def _obey(self, command: str, rest: str) -> None:
        match command:
            case "reset":
                self._messages.clear()
            case "system":
                self._system = rest
                self._messages.clear()
            case "undo":
                self._last_question()
            case "retry":
                if question := self._last_question():
                    self._ask(question)
            case "set":
                (option, *below), value = assignment("/set", rest)
                changed = {**self._options, ".".join([option, *below]): value}
                validate(GenerateParamsConfig, changed)
                self._options = changed
            case "options":
                for option, value in self._options.items():
                    typer.echo(f"{option}={value}")
            case "help":
                typer.echo(HELP)
            case _:
                raise InvalidRequestError(f"/{command}: there is no such command; /help lists them")

    def _ask(self, question: str) -> None:
        """Stream the answer. Ctrl-C stops it; what there is of it stays in the conversation."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*self._messages, {"role": "user", "content": question}]
        answer = ""
        with contextlib.suppress(KeyboardInterrupt):
            for piece in self._client.stream(Chat((*system, *messages)), **self._options):
                answer += piece.generated_text
                say(piece.generated_text, nl=False)
        typer.echo()
        self._messages = [*messages, {"role": "assistant", "content": answer}]

    def _last_question(self) -> str:
        """Forget the last question and its answer; return the question, "" when there is none."""
        *self._messages, question, _ = self._messages or [{"content": ""}, {}]
        return question["content"]
