"""Holds answers to a grammar: which tokens may come next in each. Imports no torch; the grammars are llguidance's.

A grammar is by others: it is compiled in a process of its own first, which is ended where that takes too much. What
a step needs is computed beside the step loop, and a sequence waits for its own alone, see BatchingEngine.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any

import numpy as np

from mii_hpc.errors import InvalidRequestError
from mii_hpc.printable import one_line

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from mii_hpc.engine.tokenizer import Tokenizer

COMPILE_SECONDS = 3
"""What a grammar may take to compile: of a CPU's time, and of the clock's ten times that."""
COMPILE_BYTES = 2**31
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}
"""What llguidance may do for one grammar, and for one token of an answer: some 10 ms, of memory some 100 MB."""
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON comes as Python writes it. Where a model may choose the space between its parts, some write nothing else."""

_TRIAL = f"""
import json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({COMPILE_SECONDS}, {COMPILE_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({COMPILE_BYTES}, {COMPILE_BYTES}))
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
((kind, wanted),) = json.load(sys.stdin).items()
try:
    if kind == "json":
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(wanted), defaults={ONE_LINE!r})
    else:
        grammar = grammar_from(kind, json.dumps(wanted) if kind == "choice" else wanted)
except ValueError as error:
    print(json.dumps(["", str(error)]))
else:
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=LLParserLimits(**{LIMITS!r}))
    matcher.compute_bitmask()
    print(json.dumps([grammar, matcher.get_error()]))
"""


class Guides:
    """Makes the guides of answers, for one model. May be used on any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._model = tokenizer
        self._making = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._compiled = functools.lru_cache(maxsize=256)(_compiled)

    def make(self, wanted: str, ends: Collection[int], count: int) -> list[Guide]:
        """Return a guide for each of so many answers, which end with one of the tokens `ends`.

        `wanted` is what GenerateParamsConfig.structured_outputs is. Raises InvalidRequestError for no such grammar.
        """
        from llguidance import LLMatcher, LLParserLimits

        grammar = self._compiled(wanted)
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        _check(matcher)
        matchers = [matcher, *(matcher.deep_copy() for _ in range(1, count))]
        return [Guide(each, self._model.vocabulary, self._model.eos_token_ids, ends) for each in matchers]

    def _vocabulary(self) -> LLTokenizer:
        with self._making:
            if self._tokens is None:
                from llguidance import hf

                try:
                    # Which tokens end an answer is for its Guide to say; llguidance takes one, or chooses it itself.
                    end = next(iter(self._model.eos_token_ids), None)
                    self._tokens = hf.from_tokenizer(self._model.pretrained, self._model.vocabulary, end)
                except Exception as error:  # noqa: BLE001 (whatever kind it is, this model's answers are not guided)
                    raise InvalidRequestError(
                        f"structured_outputs: not with this model's tokenizer: {one_line(error)}"
                    ) from None
            return self._tokens


class Guide:
    """Holds one answer to its grammar. Used by one thread at a time.

    Attributes:
        is_ready: whether it is known what may come next.
    """

    def __init__(
        self, matcher: LLMatcher, vocabulary: int, eos_token_ids: Collection[int], ends: Collection[int]
    ) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._ends = list(ends)
        self._all_ends = list({*eos_token_ids, *ends})
        self._failure = ""
        self._next: Future[tuple[bytes, bool]] | None = None

    def advance(self, token_id: int) -> bool:
        """Take the answer's next token, unless that ends it; return whether nothing can follow.

        Raises InvalidRequestError when the grammar does not have it there, or has become too complex.
        """
        self._next = None
        if self._failure:
            raise InvalidRequestError(f"structured_outputs: {self._failure}")
        self._matcher.consume_token(token_id)
        _check(self._matcher)
        return bool(self._matcher.is_stopped())

    def look_ahead(self, executor: Executor, done: Callable[[], object]) -> Future[Any]:
        """Begin to find out what may come next, and call `done` once it is known."""
        self._next = future = executor.submit(self._look)
        future.add_done_callback(lambda _: done())
        return future

    @property
    def is_ready(self) -> bool:
        return self._next is not None and self._next.done()

    def allowed(self, may_end: bool) -> np.ndarray:
        """Return which tokens [vocabulary] may come next, at least one; waits for what `look_ahead` has begun.

        Those that end the answer are among them where it is complete and `may_end`, or nothing else can follow. Where
        the grammar fails all are, and `advance` tells of it.
        """
        assert self._next is not None, "look_ahead() comes first"
        bits, is_complete = self._next.result()
        allowed = np.unpackbits(np.frombuffer(bits, np.uint8), count=self._vocabulary, bitorder="little").astype(bool)
        allowed[self._all_ends] = False
        if is_complete and self._ends and may_end:
            allowed[self._ends] = True
        elif is_complete and not allowed.any():
            allowed[self._ends or self._all_ends] = True
        if not allowed.any():
            self._failure = self._matcher.get_error() or "no token of the model goes on with it"
            allowed[:] = True
        return allowed

    def _look(self) -> tuple[bytes, bool]:
        return self._matcher.compute_bitmask(), self._matcher.is_accepting()


def _compiled(wanted: str) -> str:
    """Return llguidance's grammar for what is wanted, which is sure to compile."""
    much = f"structured_outputs: takes more than {COMPILE_SECONDS} s, or {COMPILE_BYTES >> 30} GiB, to compile"
    try:
        trial = subprocess.run(
            [sys.executable, "-P", "-c", _TRIAL],
            input=wanted.encode(),
            capture_output=True,
            timeout=10 * COMPILE_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise InvalidRequestError(much) from None
    except subprocess.CalledProcessError as error:
        if error.returncode < 0:
            raise InvalidRequestError(much) from None
        lines = error.stderr.decode(errors="replace").splitlines() or [""]
        raise InvalidRequestError(f"structured_outputs: {one_line(lines[-1])}") from None
    grammar, mistake = json.loads(trial.stdout)
    if mistake:
        raise InvalidRequestError(f"structured_outputs: {one_line(mistake)}")
    return str(grammar)


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise InvalidRequestError(f"structured_outputs: {one_line(matcher.get_error())}")
