"""What the tests of every engine share: running one on a thread, and gathering its answers."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from mii_hpc.config import GenerateParamsConfig, ModelConfig
from mii_hpc.engine import create_engine
from mii_hpc.engine.base import Engine, EngineSpec
from mii_hpc.generation import OWNER, Caller, GenerationRequest, Prompt, Response, ResumedAnswer
from tests.waiting import PATIENCE, eventually

attention = "auto"
"""What EngineConfig.attention is where a test does not say it; set by pytest's --attention."""


@contextmanager
def running(engine: Engine, asked: Callable[[], object] = lambda: None) -> Iterator[Engine]:
    """Load an engine and run it; what is `asked` before its first step is in hand in that."""
    engine.load(lambda sentence: None)
    asked()
    thread = threading.Thread(target=engine.run)
    thread.start()
    try:
        yield engine
    finally:
        engine.close()
        thread.join(PATIENCE)
        assert not thread.is_alive()


class Collected:
    """Everything that was delivered for one request."""

    def __init__(self, id: str, sequences: int = 1) -> None:
        self.id = id
        self.pieces: list[Response] = []
        self.error: Exception | None = None
        self.done = threading.Event()
        self.began = threading.Event()
        self._open = sequences

    def __call__(self, item: Response | Exception) -> None:
        assert not self.done.is_set(), "delivered after the end"
        if isinstance(item, Exception):
            self.error = item
            self.done.set()
        else:
            self.pieces.append(item)
            self._open -= item.ended
            if not self._open:
                self.done.set()
        self.began.set()

    def wait(self) -> Self:
        assert self.done.wait(PATIENCE), "no answer"
        if self.error:
            raise self.error
        return self

    def of(self, index: int = 0) -> list[Response]:
        return [piece for piece in self.pieces if piece.index == index]

    def text(self, index: int = 0) -> str:
        return "".join(piece.generated_text for piece in self.of(index))

    def token_ids(self, index: int = 0) -> list[int]:
        return [token for piece in self.of(index) for token in piece.token_ids]

    def logprobs(self, index: int = 0) -> list[float]:
        return [value for piece in self.of(index) for value in piece.logprobs]

    def finish_reason(self, index: int = 0) -> str:
        return self.of(index)[-1].finish_reason


_ids = iter(range(10**9))


def submit(
    engine: Engine,
    prompt: Prompt,
    id: str | None = None,
    resume: tuple[ResumedAnswer, ...] = (),
    admitted: bool = False,
    caller: Caller = (OWNER, ""),
    reports: bool = False,
    **options: Any,
) -> Collected:
    params = GenerateParamsConfig(**options)
    ended = sum(answer.ended for answer in resume)
    collected = Collected(id or f"r{next(_ids)}", params.num_return_sequences - ended)
    engine.submit(GenerationRequest(collected.id, prompt, params, resume, admitted, caller, reports), collected)
    return collected


def make(**model: Any) -> Engine:
    return create_engine(EngineSpec.alone(ModelConfig(**with_attention(model))))


def with_attention(model: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a ModelConfig with the attention to test."""
    # To compile takes longer on a GPU than all that most tests do.
    config = {"attention": attention, "compile": False, **model.get("inference_engine_config", {})}
    return {**model, "inference_engine_config": config}


def drained(engine: Engine) -> None:
    """Wait until the engine has no request, and every block of its cache is free."""

    def is_idle() -> bool:
        load = engine.stats()
        return load.free_blocks == load.total_blocks and not load.running and not load.waiting

    eventually(is_idle, what="the engine is idle")
