"""DeepSpeed-MII's non-persistent form: the engine in this process, without a server."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Self

from mii_hpc.config import SUPERSEDED_MODEL_FIELDS, GenerateParamsConfig, ModelConfig, resolve, unknown_name, validate
from mii_hpc.engine import create_engine
from mii_hpc.engine.base import Engine, EngineSpec
from mii_hpc.errors import ConfigError, InvalidRequestError, RequestError, RequestTimeoutError, UnavailableError
from mii_hpc.generation import GenerationRequest, Response, joined

log = logging.getLogger(__name__)

IN_FLIGHT = 256
"""Requests of one call that the engine has in hand at once."""
Arrived = tuple[int, Response | Exception]
"""What came for one of a call's prompts, by its number."""


def pipeline(
    model_name_or_path: str = "", model_config: Mapping[str, Any] | ModelConfig | None = None, **kwargs: Any
) -> MIIPipeline:
    """Load a model into this process and return what generates with it.

    Keywords are any field of ModelConfig. Raises ConfigError for a wrong one, for a model that cannot be served, and
    for more than one rank: those take a deployment, made by serve().
    """
    fields = {*ModelConfig.model_fields, *SUPERSEDED_MODEL_FIELDS}
    for name in kwargs.keys() - fields:
        raise ConfigError(unknown_name("keyword", name, fields))
    model = resolve(model_name_or_path, model_config, **kwargs).model_conf
    for name in ("tensor_parallel", "replica_num"):
        if getattr(model, name) > 1:
            raise ConfigError(f"{name}={getattr(model, name)}: a pipeline is a single process; use serve() for more")
    return MIIPipeline(model)


class MIIPipeline:
    """A model in this process. It is called like a client, from any thread; `replica` of its answers is 0."""

    def __init__(self, model: ModelConfig) -> None:
        self.model_config = model
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._calls: set[queue.SimpleQueue[Arrived]] = set()
        self._end: str | None = None
        self._engine: Engine = create_engine(EngineSpec.alone(model))
        loaded: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, args=(loaded,), name="mii-pipeline", daemon=True)
        self._thread.start()
        try:
            loaded.result()
        except BaseException:  # Ctrl-C too: the thread would go on and keep the model
            self._engine.close()
            raise

    def generate(
        self,
        prompts: str | Sequence[str],
        streaming_fn: Callable[[list[Response]], object] | None = None,
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> list[Response]:
        """Return the answers to one or more prompts, in their order. See AsyncMIIClient.generate()."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if streaming_fn is not None and len(texts) != 1:
            raise InvalidRequestError(f"streaming_fn: takes one prompt at a time, not {len(texts)}")
        if streaming_fn is not None:
            options["stream"] = True
        pieces: list[list[Response]] = [[] for _ in texts]
        errors: dict[int, RequestError] = {}
        with contextlib.closing(self._pieces(texts, timeout, options)) as arriving:
            for number, item in arriving:
                if isinstance(item, RequestError):
                    errors[number] = item
                    continue
                pieces[number].append(item)
                if streaming_fn is not None:
                    streaming_fn([item])
        outcomes = [errors.get(number) or joined(parts) for number, parts in enumerate(pieces)]
        if errors:
            first = errors[min(errors)]
            first.responses = list(outcomes)
            raise first
        return [answer for outcome in outcomes if isinstance(outcome, list) for answer in outcome]

    __call__ = generate

    def stream(self, prompt: str, *, timeout: float | None = None, **options: Any) -> Iterator[Response]:
        """Yield the pieces of one prompt's answer as they are made. Leaving the iteration cancels the request."""
        with contextlib.closing(self._pieces([prompt], timeout, {**options, "stream": True})) as arriving:
            for _, item in arriving:
                if isinstance(item, RequestError):
                    raise item
                yield item

    def close(self) -> None:
        """End the engine. Calls that are under way, and later ones, raise UnavailableError."""
        self._engine.close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pieces(
        self, prompts: list[str], timeout: float | None, options: dict[str, Any]
    ) -> Generator[tuple[int, Response | RequestError]]:
        """Yield what comes for each prompt, by its number. Closing the iterator cancels what is under way."""
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise InvalidRequestError("prompts: must be a string or strings")
        params = validate(GenerateParamsConfig, options)
        deadline = None if timeout is None else time.monotonic() + timeout
        arrived: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
        waiting = list(enumerate(prompts))[::-1]
        under_way: dict[int, str] = {}
        unfinished = [params.num_return_sequences] * len(prompts)
        room = min(IN_FLIGHT, self.model_config.inference_engine_config.queue_bound)
        with self._call(arrived):
            try:
                while waiting or under_way:
                    while waiting and len(under_way) < room:
                        number, prompt = waiting.pop()
                        under_way[number] = self._submit(number, prompt, params, arrived)
                    try:
                        number, item = arrived.get(
                            timeout=None if deadline is None else max(0.0, deadline - time.monotonic())
                        )
                    except queue.Empty:
                        raise RequestTimeoutError(
                            f"timeout={timeout}: it passed before the answer was complete"
                        ) from None
                    if number < 0:
                        raise UnavailableError(str(item))
                    if isinstance(item, Exception):
                        del under_way[number]
                        yield number, item if isinstance(item, RequestError) else RequestError(str(item))
                        continue
                    unfinished[number] -= item.ended
                    if not unfinished[number]:
                        del under_way[number]
                    yield number, item
            finally:
                for request_id in under_way.values():
                    self._engine.cancel(request_id)

    def _submit(
        self, number: int, prompt: str, params: GenerateParamsConfig, arrived: queue.SimpleQueue[Arrived]
    ) -> str:
        request = GenerationRequest(str(next(self._numbers)), prompt, params)
        self._engine.submit(request, lambda item: arrived.put((number, item)))
        return request.id

    @contextlib.contextmanager
    def _call(self, arrived: queue.SimpleQueue[Arrived]) -> Iterator[None]:
        """Within this context the queue is told when the engine ends."""
        with self._lock:
            if self._end is not None:
                raise UnavailableError(self._end)
            self._calls.add(arrived)
        try:
            yield
        finally:
            with self._lock:
                self._calls.discard(arrived)

    def _work(self, loaded: Future[None]) -> None:
        try:
            self._engine.load(log.info)
        except BaseException as error:  # noqa: BLE001 (the thread's boundary: the constructor raises it, an exit too)
            loaded.set_exception(error)
        else:
            loaded.set_result(None)
            self._run()

    def _run(self) -> None:
        end = "the pipeline is closed"
        try:
            self._engine.run()
        except Exception as error:  # the thread's boundary: every call is to hear of it
            log.exception("the engine has failed")
            end = f"the engine has failed: {error!r}"
        with self._lock:
            self._end = end
            for arrived in self._calls:
                arrived.put((-1, UnavailableError(end)))
