"""An engine that answers with the prompt's own words: for trials and tests, without torch or a model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mii_hpc.constants import GenerationFinishReason
from mii_hpc.engine.answer import Answer, answer_limit
from mii_hpc.engine.base import EngineSpec
from mii_hpc.errors import InvalidRequestError, QueueFullError
from mii_hpc.generation import Deliver, GenerationRequest, Load, Response

MAX_BATCH_SIZE = 256
CONTEXT = 2**31 - 1


class EchoEngine:
    """Repeats the prompt, a word per token and `echo_delay` seconds per token.

    A token is a word of the prompt followed by one space; its id is the word's index in the prompt. The
    answer is the prompt's words once and ends with "stop"; with `max_new_tokens` or `max_length` it repeats
    them up to that bound and ends with "length". Requests run concurrently.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._config = spec.model.inference_engine_config
        self._max_running = self._config.max_batch_size or MAX_BATCH_SIZE
        self._changed = threading.Condition()
        self._waiting: deque[_Echo] = deque()
        self._running: dict[str, _Echo] = {}
        self._generated = 0
        self._closed = False

    def load(self, progress: Callable[[str], None]) -> None:
        """Load nothing, at once."""
        progress("the echo engine has nothing to load")

    def run(self) -> None:
        """Echo until `close` is called."""
        while True:
            with self._changed:
                while not (self._closed or self._waiting or self._running):
                    self._changed.wait()
                if self._closed:
                    return
                while self._waiting and len(self._running) < self._max_running:
                    echo = self._waiting.popleft()
                    self._running[echo.request.id] = echo
                running = list(self._running.values())
            self._step(running)

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Queue a request. Raises QueueFullError when too many wait."""
        with self._changed:
            if len(self._waiting) >= self._config.queue_bound:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting; try again later")
            self._waiting.append(_Echo(request, deliver))
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """Forget a request."""
        with self._changed:
            self._running.pop(request_id, None)
            self._waiting = deque(echo for echo in self._waiting if echo.request.id != request_id)
            self._changed.notify_all()

    @property
    def tokenizer(self) -> None:
        """None: a token is a word."""
        return None

    def stats(self) -> Load:
        """Return the load; there are no blocks."""
        with self._changed:
            return Load(running=len(self._running), waiting=len(self._waiting), generated_tokens=self._generated)

    def close(self) -> None:
        """Make `run` return. Unfinished requests are dropped."""
        with self._changed:
            self._closed = True
            self._running.clear()
            self._waiting.clear()
            self._changed.notify_all()

    def _step(self, running: list[_Echo]) -> None:
        now = time.monotonic()
        for echo in running:
            if not echo.due:
                self._start(echo, now)
            if echo.due <= now and self._is_running(echo):
                self._generate(echo)
                echo.due = max(echo.due + self._config.echo_delay, now)
        with self._changed:
            if self._running and not self._closed:
                wait = min(echo.due for echo in self._running.values()) - time.monotonic()
                if wait > 0 and not (self._waiting and len(self._running) < self._max_running):
                    self._changed.wait(wait)

    def _start(self, echo: _Echo, now: float) -> None:
        echo.due = now + self._config.echo_delay
        try:
            echo.begin(self._spec.model.max_length or CONTEXT)
        except InvalidRequestError as error:
            self._deliver(echo, error)

    def _generate(self, echo: _Echo) -> None:
        for answer in echo.answers:
            token_id = answer.generated % len(echo.words)
            if not answer.ended:
                piece = answer.add(token_id, 0.0 if echo.request.params.logprobs else None)
                self._generated += 1
                if piece:
                    self._deliver(echo, piece)

    def _is_running(self, echo: _Echo) -> bool:
        with self._changed:
            return self._running.get(echo.request.id) is echo

    def _deliver(self, echo: _Echo, item: Response | Exception) -> None:
        # Under the lock, so that nothing is delivered once cancel() has returned.
        with self._changed:
            if self._running.get(echo.request.id) is not echo:
                return
            if isinstance(item, Exception) or echo.is_finished():
                del self._running[echo.request.id]
            echo.deliver(item)


@dataclass
class _Echo:
    """A request that waits or runs; `due` is when its next tokens are due, 0 before its start."""

    request: GenerationRequest
    deliver: Deliver
    due: float = 0.0
    words: tuple[str, ...] = ()
    answers: tuple[Answer, ...] = ()

    def begin(self, context: int) -> None:
        params = self.request.params
        self.words = tuple(f"{word} " for word in self.request.prompt.split())
        count = len(self.words)
        if not count:
            raise InvalidRequestError("the prompt is empty")
        once = max(count, params.min_new_tokens)
        repeats = params.max_new_tokens is not None or params.max_length is not None
        limit = answer_limit(params, count, context)
        limit = limit if repeats else min(limit, once)
        self.answers = tuple(
            Answer(
                params,
                _Words(self.words),
                prompt=self.request.prompt,
                prompt_length=count,
                limit=limit,
                index=index,
                limit_reason=GenerationFinishReason.LENGTH if repeats or limit < once else GenerationFinishReason.STOP,
            )
            for index in range(params.num_return_sequences)
        )

    def is_finished(self) -> bool:
        return all(answer.ended for answer in self.answers)


class _Words:
    """The text source of an echo: the text of a token is the word of that index."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = words

    def push(self, token_id: int) -> str:
        return self._words[token_id]

    def flush(self) -> str:
        return ""
