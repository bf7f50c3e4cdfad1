"""Batches of requests in OpenAI's format: a file of lines in, a file of answers and one of errors out.

What has an answer or an error is known by its custom_id and a digest of its request, and is not asked again: a batch
that was stopped, however, goes on where it was when it is run again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mii_hpc.errors import ConfigError, MIIError, QueueFullError
from mii_hpc.gateway.model import ServedModel
from mii_hpc.gateway.schema import ChatCompletion, Completion, Generation, RefusedError, error_body, parse, status_of

URLS: dict[str, type[Generation]] = {"/v1/completions": Completion, "/v1/chat/completions": ChatCompletion}
TRIES = 8
"""How often a request is sent, at most, that meets no fault of its own; then the batch ends with the error."""
BEGINNING = b'{"id": "batch_req_'
"""What every line of the output begins with."""
SYNC_SECONDS = 1.0
"""How often the answers are flushed to the filesystem."""


class Line(BaseModel):
    """One request of a batch."""

    model_config = ConfigDict(extra="ignore")

    custom_id: str
    url: str
    method: str = "POST"
    body: dict[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from every other request: its custom_id and a digest of the rest."""
        rest = json.dumps([self.url, self.body], sort_keys=True)
        return self.custom_id, hashlib.sha256(rest.encode()).hexdigest()[:32]


@dataclass
class Progress:
    """How far a batch is. `earlier` counts what was done before, `answered` and `failed` what was done now."""

    total: int
    earlier: int = 0
    answered: int = 0
    failed: int = 0


class Batch:
    """A batch and its files. Raises ConfigError when a file cannot be used, or a line of the input is no request."""

    def __init__(self, source: Path, answers: Path, errors: Path) -> None:
        self._source = source
        ids: set[str] = set()
        for number, line in self._lines():
            if line.custom_id in ids:
                raise ConfigError(f"{source}: line {number}: custom_id='{line.custom_id}' is there before")
            ids.add(line.custom_id)
        self._done = {*_done(answers), *_done(errors)}
        self.progress = Progress(len(ids), sum(line.key in self._done for _, line in self._lines()))
        self._answers, self._errors = answers, errors

    async def run(self, model: ServedModel, concurrency: int, advanced: Callable[[Progress], None]) -> None:
        """Ask for all that is missing, so many at once; `advanced` is called after each.

        Raises the error that is no single request's fault, once it has come TRIES times.
        """
        room = asyncio.Semaphore(concurrency)
        with _Output(self._answers) as answers, _Output(self._errors) as errors:

            async def ask(line: Line) -> None:
                try:
                    status, body = await _answer(model, line)
                finally:
                    room.release()
                failed = status >= 400
                self.progress.failed += failed
                self.progress.answered += not failed
                (errors if failed else answers).write(_written(line, status, body))
                advanced(self.progress)

            async with asyncio.TaskGroup() as tasks:
                for _, line in self._lines():
                    if line.key not in self._done:
                        await room.acquire()
                        tasks.create_task(ask(line))

    def _lines(self) -> Iterator[tuple[int, Line]]:
        try:
            with self._source.open() as file:
                for number, text in enumerate(file, 1):
                    if text.strip():
                        yield number, Line.model_validate_json(text)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._source}: cannot be read: {error}") from None
        except ValidationError as error:
            mistake = error.errors()[0]
            field = ".".join(map(str, mistake["loc"])) or "the line"
            raise ConfigError(f"{self._source}: line {number}: {field}: {mistake['msg']}") from None


async def _answer(model: ServedModel, line: Line) -> tuple[int, dict[str, Any]]:
    """Return status and body. Raises MIIError when it is not this request's fault, and does not pass."""
    tried = 0
    while True:
        try:
            if line.method != "POST" or line.url not in URLS:
                raise RefusedError(f"{line.method} {line.url}: a batch has POST to {' or '.join(URLS)}", "url")
            asked = parse(URLS[line.url], json.dumps({"model": model.name, **line.body, "stream": False}).encode())
            return 200, await model.answer(asked)
        except MIIError as error:
            status = status_of(error)
            if not error.retryable and status < 503:
                return status, error_body(error, status)
            tried += not isinstance(error, QueueFullError)
            if tried >= TRIES:
                raise
            await asyncio.sleep(min(30.0, 0.25 * 2**tried))


def _written(line: Line, status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": body.get("id", ""), "body": body}
    return {
        "id": f"batch_req_{line.key[1]}",
        "custom_id": line.custom_id,
        "response": response,
        "error": body.get("error"),
        "digest": line.key[1],
    }


def _done(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the keys of what a file has; a torn last line, of a process that was killed, is cut off."""
    whole = number = 0
    try:
        with path.open("rb+") as file:
            for number, text in enumerate(file, 1):  # noqa: B007 (for the error)
                if not text.endswith(b"\n") and (text.startswith(BEGINNING) or BEGINNING.startswith(text)):
                    file.truncate(whole)
                    return
                written = json.loads(text)
                yield written["custom_id"], written["digest"]
                whole += len(text)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: line {number} was not written by a batch; name another file") from None


class _Output:
    """A file to which whole lines are added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._synced = time.monotonic()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()

    def write(self, value: dict[str, Any]) -> None:
        """Add a line, in one piece; the first one makes the file."""
        self._file = self._file or self._path.open("ab", buffering=0)
        self._file.write(json.dumps(value).encode() + b"\n")
        if time.monotonic() > self._synced + SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()
