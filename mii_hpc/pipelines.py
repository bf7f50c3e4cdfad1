"""DeepSpeed-MII's non-persistent form: the engine in this process, without a server."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Self

from mii_hpc.config import SUPERSEDED_MODEL_FIELDS, GenerateParamsConfig, ModelConfig, resolve, unknown_name, validate
from mii_hpc.engine import create_engine
from mii_hpc.engine.base import Engine, EngineSpec
from mii_hpc.engine.launched import LaunchedRanks, end_at_exit, launched_world_size
from mii_hpc.errors import (
    ConfigError,
    InvalidRequestError,
    RequestError,
    RequestTimeoutError,
    UnavailableError,
    UnknownArgument,
)
from mii_hpc.generation import GenerationRequest, Prompt, Prompts, Response, as_prompt, as_prompts, joined

log = logging.getLogger(__name__)

CLOSED = "the pipeline is closed"
IN_FLIGHT = 256
"""Requests of one call that run or wait in the engine at once."""
Arrived = tuple[int, Response | Exception]
"""What came for one of a call's prompts, by its number."""


def pipeline(
    model_name_or_path: str = "",
    model_config: Mapping[str, Any] | ModelConfig | None = None,
    all_rank_output: bool = False,
    **kwargs: Any,
) -> MIIPipeline:
    """Load a model into this process and return what generates with it.

    Keywords are any field of ModelConfig. In a script that torchrun or DeepSpeed's launcher has started, all its
    ranks load one model together, each a shard; rank 0 answers, and the others too with `all_rank_output`.

    Raises ConfigError for a wrong keyword, for a model that cannot be served, and for another number of ranks than
    were started.
    """
    return MIIPipeline(_model(model_name_or_path, model_config, kwargs), all_rank_output)


def async_pipeline(model_config: Mapping[str, Any] | ModelConfig) -> MIIAsyncPipeline:
    """Load a model into this process, to be given prompts now and asked for answers later. See pipeline().

    Raises ConfigError in a launcher's ranks: use serve() for several.
    """
    if launched_world_size() > 1:
        raise ConfigError(f"WORLD_SIZE={launched_world_size()}: an async pipeline is a single rank; use serve()")
    return MIIAsyncPipeline(MIIPipeline(_model("", model_config, {})))


def _model(name: str, config: Mapping[str, Any] | ModelConfig | None, keywords: dict[str, Any]) -> ModelConfig:
    fields = {*ModelConfig.model_fields, *SUPERSEDED_MODEL_FIELDS}
    for unknown in keywords.keys() - fields:
        raise UnknownArgument(unknown_name("keyword", unknown, fields))
    model = resolve(name, config, **keywords).model_conf
    if model.replica_num > 1:
        raise ConfigError(f"replica_num={model.replica_num}: a pipeline is a single replica; use serve() for more")
    ranks = launched_world_size()
    if "tensor_parallel" not in model.model_fields_set:
        return model.model_copy(update={"tensor_parallel": ranks})
    if model.tensor_parallel != ranks:
        raise ConfigError(
            f"tensor_parallel={model.tensor_parallel}: a pipeline takes all ranks of its launcher, and here is "
            f"{ranks}; start the script with `torchrun --nproc-per-node {model.tensor_parallel}` or `deepspeed "
            f"--num_gpus {model.tensor_parallel}`, or use serve()"
        )
    return model


class MIIPipeline:
    """A model in this process. It is called like a client, from any thread; `replica` of its answers is 0.

    In a launcher's ranks, every rank makes the same calls in the same order, from one thread.
    """

    def __init__(self, model: ModelConfig, all_rank_output: bool = False) -> None:
        self.model_config = model
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        # All threads together queue no more than the engine takes.
        self._room = threading.Semaphore(model.inference_engine_config.queue_bound)
        self._calls: set[queue.SimpleQueue[Arrived]] = set()
        self._end: str | None = None
        self._ranks: LaunchedRanks | None = None
        spec = EngineSpec.alone(model)
        if model.tensor_parallel > 1:
            self._ranks = LaunchedRanks(all_rank_output)
            spec = self._ranks.spec(model)
        self.is_rank_0 = spec.rank == 0
        """Whether this rank answers."""
        with _environment_kept():
            self._engine: Engine | None = create_engine(spec)
        loaded: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._work, args=(self._engine, loaded), name="mii-pipeline", daemon=True
        )
        self._thread.start()
        try:
            loaded.result()
        except BaseException:  # Ctrl-C too: the thread would go on and keep the model
            self._engine.close()
            raise
        self.tokenizer = self._engine.tokenizer
        """The model's tokenizer, as transformers has it."""
        if self._ranks is not None:
            end_at_exit(self.close)

    def generate(
        self,
        prompts: Prompts,
        streaming_fn: Callable[[list[Response]], object] | None = None,
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> list[Response]:
        """Return the answers to one or more prompts, in their order. See AsyncMIIClient.generate()."""
        if self._ranks is not None and not self.is_rank_0:
            return self._ranks.follow(lambda: self._end)
        with self._leading() as answers:
            answers += self._generate(prompts, streaming_fn, timeout, options)
        return answers

    __call__ = generate

    def _leading(self) -> contextlib.AbstractContextManager[list[Response]]:
        return self._ranks.lead() if self._ranks is not None else contextlib.nullcontext([])

    def _generate(
        self,
        prompts: Prompts,
        streaming_fn: Callable[[list[Response]], object] | None,
        timeout: float | None,
        options: dict[str, Any],
    ) -> list[Response]:
        several = as_prompts(prompts)
        if streaming_fn is not None and len(several) != 1:
            raise InvalidRequestError(f"streaming_fn: takes one prompt at a time, not {len(several)}")
        if streaming_fn is not None:
            options["stream"] = True
        pieces: list[list[Response]] = [[] for _ in several]
        errors: dict[int, RequestError] = {}
        with contextlib.closing(self._pieces(several, timeout, options)) as arriving:
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

    def stream(
        self, prompt: Prompt | Sequence[int], *, timeout: float | None = None, **options: Any
    ) -> Iterator[Response]:
        """Yield the pieces of one prompt's answer as they are made. Leaving the iteration cancels the request.

        On other ranks than 0 they come, if at all, when rank 0 has had the last.
        """
        if self._ranks is not None and not self.is_rank_0:
            yield from self._ranks.follow(lambda: self._end)
            return
        with (
            self._leading() as answers,
            contextlib.closing(self._pieces([as_prompt(prompt)], timeout, {**options, "stream": True})) as arriving,
        ):
            for _, item in arriving:
                if isinstance(item, RequestError):
                    raise item
                answers.append(item)
                yield item

    def close(self) -> None:
        """End the engine and free its memory. Calls that run, and later ones, raise UnavailableError.

        On other ranks than 0 this waits for rank 0 to do the same. Nothing happens the second time.
        """
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is None:
            return
        engine.close()
        self._thread.join()
        del engine
        gc.collect()
        if self.model_config.inference_engine_config.engine == "deepspeed":
            from mii_hpc.engine.memory import free_cached

            free_cached()

    destroy = close

    @property
    def is_closed(self) -> bool:
        """Whether close() was called."""
        return self._engine is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pieces(
        self, prompts: list[Prompt], timeout: float | None, options: dict[str, Any]
    ) -> Generator[tuple[int, Response | RequestError]]:
        """Yield what comes for each prompt, by its number. Closing the iterator cancels the requests that run.

        Where the timeout passes, or the engine ends, each prompt that is not answered has the error.
        """
        params = validate(GenerateParamsConfig, options)
        unfinished = [params.num_return_sequences] * len(prompts)
        try:
            yield from self._arriving(prompts, timeout, params, unfinished)
        except (RequestTimeoutError, UnavailableError) as error:
            if not any(unfinished):
                raise
            for number, count in enumerate(unfinished):
                if count:
                    yield number, copy.copy(error)

    def _arriving(
        self, prompts: list[Prompt], timeout: float | None, params: GenerateParamsConfig, unfinished: list[int]
    ) -> Generator[tuple[int, Response | RequestError]]:
        """Do so as long as nothing ends the call; `unfinished` counts down the answers of each prompt."""
        deadline = None if timeout is None else time.monotonic() + timeout
        late = RequestTimeoutError(f"timeout={timeout}: it passed before the answer was complete")
        arrived: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
        waiting = list(enumerate(prompts))[::-1]
        running: dict[int, str] = {}
        with self._call(arrived) as engine:
            try:
                while waiting or running:
                    while waiting and len(running) < IN_FLIGHT:
                        # Other threads' requests may take all the room; then this call's own go on, or it waits.
                        if not self._room.acquire(timeout=0 if running else _left(deadline)):
                            if running:
                                break
                            raise late
                        number, prompt = waiting.pop()
                        try:
                            running[number] = self._submit(engine, number, prompt, params, arrived)
                        except BaseException:
                            self._room.release()
                            raise
                    try:
                        number, item = arrived.get(timeout=_left(deadline))
                    except queue.Empty:
                        raise late from None
                    if number < 0:
                        raise UnavailableError(str(item))
                    if isinstance(item, Exception):
                        unfinished[number] = 0
                        del running[number]
                        self._room.release()
                        yield number, item if isinstance(item, RequestError) else RequestError(str(item))
                        continue
                    unfinished[number] -= item.ended
                    if not unfinished[number]:
                        del running[number]
                        self._room.release()
                    yield number, item
            finally:
                for request_id in running.values():
                    engine.cancel(request_id)
                    self._room.release()

    def submit(
        self, number: int, prompt: Prompt, options: Mapping[str, Any], arrived: queue.SimpleQueue[Arrived]
    ) -> None:
        """Queue a request, whose pieces or error go to `arrived` with its number.

        When the engine ends, `arrived` gets an error with a negative number.
        """
        whole = as_prompt(prompt)
        request = GenerationRequest(f"async-{number}", whole, validate(GenerateParamsConfig, options))
        with self._lock:
            engine = self._open_engine()
            self._calls.add(arrived)
        engine.submit(request, lambda item: arrived.put((number, item)))

    def cancel(self, number: int) -> None:
        """Forget a request that submit() has queued; nothing happens when it has ended."""
        with self._lock:
            engine = self._open_engine()
        engine.cancel(f"async-{number}")

    def _submit(
        self,
        engine: Engine,
        number: int,
        prompt: Prompt,
        params: GenerateParamsConfig,
        arrived: queue.SimpleQueue[Arrived],
    ) -> str:
        request = GenerationRequest(str(next(self._numbers)), prompt, params)
        engine.submit(request, lambda item: arrived.put((number, item)))
        return request.id

    @contextlib.contextmanager
    def _call(self, arrived: queue.SimpleQueue[Arrived]) -> Iterator[Engine]:
        """Yield the engine; within this context the queue gets an error when it ends."""
        with self._lock:
            engine = self._open_engine()
            self._calls.add(arrived)
        try:
            yield engine
        finally:
            with self._lock:
                self._calls.discard(arrived)

    def _open_engine(self) -> Engine:
        if self._end is not None or self._engine is None:
            raise UnavailableError(self._end or CLOSED)
        return self._engine

    def _work(self, engine: Engine, loaded: Future[None]) -> None:
        try:
            with _environment_kept():
                engine.load(log.info)
        except BaseException as error:  # noqa: BLE001 (the thread's boundary: the constructor raises it, an exit too)
            loaded.set_exception(error)
        else:
            loaded.set_result(None)
            self._run(engine)

    def _run(self, engine: Engine) -> None:
        end = CLOSED
        try:
            engine.run()
        except Exception as error:  # the thread's boundary: every call gets it
            log.exception("the engine has failed")
            end = f"the engine has failed: {error!r}"
        with self._lock:
            self._end = end
            for arrived in self._calls:
                arrived.put((-1, UnavailableError(end)))


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    """Restore the variables of the process on leaving: an engine, and what it imports, set some."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name, value in set(os.environ.items()) ^ set(before.items()):
            if name not in before:
                del os.environ[name]
            elif before[name] == value:
                os.environ[name] = value


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


class MIIAsyncPipeline:
    """A pipeline that is given prompts now and asked for their answers later, by the same thread."""

    def __init__(self, pipeline: MIIPipeline) -> None:
        self._pipeline = pipeline
        self._numbers = itertools.count(1)
        self._thread = threading.local()

    def put_request(self, prompt: Prompt, kwargs: Mapping[str, Any]) -> int:
        """Queue a prompt with its options, without waiting, and return the request's number.

        Raises what MIIPipeline.generate() raises before it waits.
        """
        if not hasattr(self._thread, "arrived"):
            self._thread.arrived = queue.SimpleQueue()
        number = next(self._numbers)
        self._pipeline.submit(number, prompt, kwargs, self._thread.arrived)
        return number

    def get_response(self) -> tuple[int, Response]:
        """Wait for the next answer to a request of this thread, or a stream's next piece; return it with the number.

        Raises the error that has ended a request; its message begins with the number.
        """
        number, item = self._thread.arrived.get()
        if isinstance(item, Exception):
            raise item if number < 0 else type(item)(f"request {number}: {item}")
        return number, item

    def flush_uid(self, uid: int) -> None:
        """Forget a request, ended or not."""
        self._pipeline.cancel(uid)

    def start(self) -> None:
        """Do nothing: it works from the beginning."""

    def shutdown(self) -> None:
        """End the engine and free its memory."""
        self._pipeline.close()

    def is_shutdown(self) -> bool:
        """Whether shutdown() was called."""
        return self._pipeline.is_closed
