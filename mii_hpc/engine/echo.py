"""An engine that answers with the prompt's own words: for trials and tests, without torch or a model."""

from __future__ import annotations

import math
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mii_hpc.config import ModelConfig
from mii_hpc.constants import GenerationFinishReason
from mii_hpc.engine.answer import Answer, answer_limit, report_period
from mii_hpc.engine.base import EngineSpec
from mii_hpc.engine.quotas import Quotas
from mii_hpc.errors import InvalidRequestError
from mii_hpc.generation import (
    LATENCY_BOUNDS,
    Chat,
    Deliver,
    Description,
    GenerationRequest,
    Load,
    Observed,
    Prompt,
    Response,
    ResumedAnswer,
    Tokenization,
)

MAX_BATCH_SIZE = 256
CONTEXT = 2**31 - 1
WORDS_REMEMBERED = 1_000_000


class EchoEngine:
    """Repeats the prompt, a word per token and `echo_delay` seconds per token.

    A token is a word followed by one space; its id is made from the word, see EchoCodec. The
    answer is the prompt's words once and ends with "stop"; with `max_new_tokens` or `max_length` it repeats
    them up to that bound and ends with "length". Every token is certain, whatever the options about its probability.
    Requests run concurrently.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self.codec = EchoCodec(spec.model)
        self._config = spec.model.inference_engine_config
        self._max_running = self._config.max_batch_size or MAX_BATCH_SIZE
        self._changed = threading.Condition()
        self._quotas = Quotas(spec)
        self._waiting: deque[_Echo] = deque()
        self._running: dict[str, _Echo] = {}
        self._queue_time = Observed(LATENCY_BOUNDS)
        self._generated = 0
        self.steps = 0
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
                while len(self._running) < self._max_running and (echo := self._next()):
                    self._waiting.remove(echo)
                    self._quotas.leave(echo.request)
                    self._running[echo.request.id] = echo
                    self._queue_time.add(time.monotonic() - echo.arrived)
                running = list(self._running.values())
                self.steps += 1
            self._step(running)

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Queue a request. Raises QueueFullError when too many wait."""
        with self._changed:
            self._quotas.enter(request)
            echo = _Echo(request, deliver)
            if request.admitted:
                self._waiting.appendleft(echo)
            else:
                self._waiting.append(echo)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """Forget a request."""
        with self._changed:
            self._running.pop(request_id, None)
            for echo in [echo for echo in self._waiting if echo.request.id == request_id]:
                self._waiting.remove(echo)
                self._quotas.leave(echo.request)
            self._changed.notify_all()

    @property
    def context(self) -> int | None:
        """The one that is configured."""
        return self._spec.model.max_length

    @property
    def tokenizer(self) -> None:
        """None: a token is a word."""
        return None

    def stats(self) -> Load:
        """Return the load; there are no blocks."""
        with self._changed:
            return Load(
                running=len(self._running),
                waiting=len(self._waiting),
                generated_tokens=self._generated,
                queue_time=self._queue_time.histogram,
            )

    def close(self) -> None:
        """Make `run` return. Unfinished requests are dropped."""
        with self._changed:
            self._closed = True
            self._running.clear()
            self._waiting.clear()
            self._changed.notify_all()

    def _next(self) -> _Echo | None:
        """Return the first that waits, of a role that may have more running; None when there is none."""
        if not self._waiting:
            return None
        running, most = Counter(echo.role for echo in self._running.values()), self._quotas.running
        return next((echo for echo in self._waiting if running[echo.role] < most.get(echo.role, math.inf)), None)

    def _step(self, running: list[_Echo]) -> None:
        now, period = time.monotonic(), report_period()
        for echo in running:
            if not echo.due:
                self._start(echo, now)
            if echo.due <= now and self._is_running(echo):
                self._generate(echo, period)
                echo.due = max(echo.due + self._config.echo_delay, now)
        with self._changed:
            if self._running and not self._closed:
                wait = min(echo.due for echo in self._running.values()) - time.monotonic()
                if wait > 0 and not (self._waiting and len(self._running) < self._max_running):
                    self._changed.wait(wait)

    def _start(self, echo: _Echo, now: float) -> None:
        echo.due = now + self._config.echo_delay
        try:
            echo.begin(self.codec, self._spec.model.max_length or CONTEXT)
        except InvalidRequestError as error:
            self._deliver(echo, error)

    def _generate(self, echo: _Echo, period: int) -> None:
        for answer in echo.answers:
            token_id = echo.tokens[answer.generated % len(echo.tokens)]
            if not answer.ended:
                params = echo.request.params
                top = ((token_id, 0.0),) if params.top_logprobs else ()
                if params.prompt_logprobs and not answer.generated:
                    answer.tell_of_prompt([(0.0, ((each, 0.0),)) for each in echo.tokens[1:]])
                piece = answer.add(token_id, 0.0 if params.logprobs else None, top=top, period=period)
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


@dataclass(eq=False)
class _Echo:
    """A request that waits or runs; `due` is when its next tokens are due, 0 before its start."""

    request: GenerationRequest
    deliver: Deliver
    arrived: float = field(default_factory=time.monotonic)
    due: float = 0.0
    tokens: tuple[int, ...] = ()
    answers: tuple[Answer, ...] = ()

    def begin(self, codec: EchoCodec, context: int) -> None:
        params = self.request.params
        if params.structured_outputs:
            raise InvalidRequestError("structured_outputs: the echo engine repeats its prompt and cannot be guided")
        self.tokens = codec.encode(self.request.prompt)
        count = len(self.tokens)
        once = max(count, params.min_new_tokens)
        repeats = params.max_new_tokens is not None or params.max_length is not None
        limit = answer_limit(params, count, context)
        limit = limit if repeats else min(limit, once)
        answers = []
        for index, so_far in enumerate(self.request.resume or (ResumedAnswer(),) * params.num_return_sequences):
            if so_far.ended:
                continue
            answer = Answer(
                params,
                _Words(codec),
                prompt=self.request.prompt,
                prompt_length=count,
                limit=limit,
                index=index,
                limit_reason=GenerationFinishReason.LENGTH if repeats or limit < once else GenerationFinishReason.STOP,
                reports=self.request.reports,
            )
            answer.resume(so_far)
            answers.append(answer)
        self.answers = tuple(answers)

    @property
    def role(self) -> str:
        return self.request.caller[0]

    def is_finished(self) -> bool:
        return all(answer.ended for answer in self.answers)


class EchoCodec:
    """Words and their ids. An id is a checksum of its word, so all engines give a word the same one.

    Back to text, an id is the word of which this codec has seen that it has this id, else the number itself.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._words: dict[int, str] = {}

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Return a prompt's tokens. Raises InvalidRequestError when it has none."""
        if isinstance(prompt, tuple):
            return prompt
        words = prompt.split() if isinstance(prompt, str) else _words_of(prompt)
        if not words:
            raise InvalidRequestError("the prompt is empty")
        named = {zlib.crc32(word.encode()) >> 1: word for word in words}
        if len(self._words) < WORDS_REMEMBERED:
            self._words |= named
        return tuple(zlib.crc32(word.encode()) >> 1 for word in words)

    def decode(self, token_id: int) -> str:
        """Return the text of a token."""
        return f"{self._words.get(token_id, token_id)} "

    def tokenize(self, prompt: Prompt, plain: bool = False) -> Tokenization:
        """See Codec."""
        token_ids = self.encode(prompt)
        texts = [self.decode(token_id) for token_id in token_ids]
        return Tokenization(token_ids, "".join(texts), tuple(text.encode() for text in texts))

    def describe(self) -> Description:
        """See Codec."""
        return Description(self._model.max_length, chat_template="ROLE: CONTENT ...", tokenizer={"class": "words"})


def _words_of(chat: Chat) -> list[str]:
    return [word for said in chat.messages for word in f"{said['role']}: {said.get('content') or ''}".split()]


class _Words:
    """The text of a token is its word."""

    def __init__(self, codec: EchoCodec) -> None:
        self._codec = codec

    def push(self, token_id: int) -> str:
        return self._codec.decode(token_id)

    def flush(self) -> str:
        return ""
