"""Command line options made from the fields of pydantic models, which stay the one place that says what is allowed."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mii_hpc.errors import ConfigError

ALIASES = {"deployment_name": ("--name",)}
"""Other names of options."""

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """The option for one field.

    Attributes:
        path: the names of the field and of those that it is nested in, outermost first.
        panel: the heading in the help.
    """

    path: tuple[str, ...]
    field: FieldInfo
    panel: str

    @property
    def name(self) -> str:
        """The field's own name, which is also its option's."""
        return self.path[-1]

    @property
    def parameter(self) -> inspect.Parameter:
        """The parameter of a command; its value is None when the option is not given."""
        flag = f"--{self.name.replace('_', '-')}"
        kind: Any = str | None
        words: dict[str, Any] = {"metavar": _metavar(self.field.annotation)}
        if self.field.annotation is bool:
            flag, kind, words = f"{flag}/--no-{flag[2:]}", bool | None, {}
        elif _is_repeated(self.field.annotation):
            kind = list[str] | None
        flags = (flag, *ALIASES.get(self.name, ()))
        shown = typer.Option(*flags, help=self._help(), rich_help_panel=self.panel, show_default=False, **words)
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, shown]
        )

    def value(self, given: Any) -> Any:
        """Return what was given as the model takes it. Raises ConfigError for a pair without "="."""
        if typing.get_origin(self.field.annotation) is not dict:
            return given
        return dict(_pair(f"--{self.name.replace('_', '-')}", text) for text in given)

    def _help(self) -> str:
        said = " ".join((self.field.description or "").split())
        default = self.field.default
        if default is PydanticUndefined or default is None or default == "" or isinstance(default, bool | tuple | dict):
            return said
        shown = default.value if isinstance(default, Enum) else default
        return f"{said} [default: {shown}]".strip()


def options_of(
    model: type[BaseModel], panels: Mapping[type[BaseModel], str], path: tuple[str, ...] = ()
) -> Iterator[Option]:
    """Yield the options of a model and of the models nested in it, those with a heading in `panels`."""
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from options_of(nested, panels, (*path, name))
        else:
            yield Option((*path, name), field, panels[model])


def takes(options: list[Option]) -> Callable[[Command], Command]:
    """Let a command, whose last parameter is `**given`, take these options."""

    def decorate(command: Command) -> Command:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        command.__signature__ = inspect.Signature([*own, *(option.parameter for option in options)])  # type: ignore[attr-defined]
        return command

    return decorate


def nested(options: list[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given as nested mappings."""
    values: dict[str, Any] = {}
    for option in options:
        if (value := given[option.name]) is not None:
            put(values, option.path, option.value(value))
    return values


def put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set what lies at a path of nested mappings. Raises ConfigError when one on the way is no mapping."""
    for place, name in enumerate(path[:-1]):
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{'.'.join(path[: place + 1])}={values!r}: has no field '{path[place + 1]}'")
    values[path[-1]] = value


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings as one: where both say something, what is above counts."""
    result = dict(below)
    for name, value in above.items():
        lower = result.get(name)
        result[name] = merged(lower, value) if isinstance(lower, dict) and isinstance(value, dict) else value
    return result


def assignment(option: str, text: str) -> tuple[tuple[str, ...], Any]:
    """Return path and value of "a.b=c"; the value may be JSON. Raises ConfigError when there is no "="."""
    name, value = _pair(option, text)
    return tuple(name.split(".")), value


def _pair(option: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ConfigError(f"{option} {text!r}: must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _is_repeated(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (tuple, dict)


def _metavar(annotation: Any) -> str:
    parts = [annotation]
    while typing.get_origin(parts[0]) in (types.UnionType, typing.Union, Annotated):
        arguments = typing.get_args(parts[0])
        parts = [part for part in arguments if part is not type(None)][:1]
    kind = parts[0]
    if typing.get_origin(kind) is Literal:
        return f"[{'|'.join(map(str, typing.get_args(kind)))}]"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"[{'|'.join(str(member.value) for member in kind)}]"
    if typing.get_origin(kind) is dict:
        return "NAME=VALUE"
    return {int: "INTEGER", float: "NUMBER"}.get(kind, "TEXT")
