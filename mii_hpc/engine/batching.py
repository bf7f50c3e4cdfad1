"""Continuous batching: requests join and leave one batch between any two steps.

The life of a request here:

1. `submit` counts it against the queue's bound and returns.
2. A thread tokenises it, one prompt after the other, off the step loop.
3. The scheduler starts it when there is room in the batch and a block in the cache, behind those blocks of
   its beginning that the cache holds already.
4. Each step computes some tokens of some sequences, on all ranks alike (runner.py).
5. The leader draws a token for each, and each answer gives its pieces until it ends or is cancelled. On a GPU the next
   step is scheduled and begun meanwhile: an answer that turns out to have ended has a token too much, which is dropped.

An answer that is held to a grammar waits for its token, and for what may follow that (guiding.py); the others go on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from typing import Any

import torch

from mii_hpc.engine.answer import Answer, Scored, answer_limit, report_period
from mii_hpc.engine.base import EngineSpec
from mii_hpc.engine.guiding import Guide, Guides
from mii_hpc.engine.quotas import Quotas
from mii_hpc.engine.runner import ModelRunner
from mii_hpc.engine.sampling import create_sampling
from mii_hpc.engine.sampling.base import NOT_FINITE, Draw, Sampler, scores_of
from mii_hpc.engine.scheduling import Scheduler
from mii_hpc.engine.step import BlockTable, Step
from mii_hpc.engine.tokenizer import Tokenizer
from mii_hpc.errors import InvalidRequestError, RequestError
from mii_hpc.generation import (
    GUEST,
    LATENCY_BOUNDS,
    OWNER,
    Caller,
    Deliver,
    GenerationRequest,
    Load,
    Observed,
    Response,
    ResumedAnswer,
)

_log = logging.getLogger(__name__)

LONG_BYTES = 2**16
"""A longer prompt is tokenised beside the others."""
_LONG = "long"
_GUIDED = {OWNER: "guided", GUEST: "guided-guest"}
LOOKING_SECONDS = 0.01
"""How long a step waits for what may follow in answers that are guided. Most take less than a hundredth of that."""
LOOKING_THREADS = 4


class BatchingEngine:
    """One rank of a replica. The leader has the requests, the scheduler and the tokenizer; each rank has its runner."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._runner: ModelRunner | None = None
        # Guards what follows. Pieces are delivered under it, so that none comes once cancel() has returned.
        self._changed = threading.Condition()
        self._requests: dict[str, _Request] = {}
        self._quotas = Quotas(spec)
        self._arrived: deque[_Sequence] = deque()
        self._cancelled: list[_Request] = []
        self._queue_time = Observed(LATENCY_BOUNDS)
        self._generated = 0
        self._steps = 0
        self._closed = False
        # The owner's need not wait for a thousand of guests, nor any for a long one, which takes seconds.
        self._tokenising = {
            line: ThreadPoolExecutor(1, thread_name_prefix=f"tokenise-{line}")
            for line in (OWNER, GUEST, _LONG, *_GUIDED.values())
        }
        self._looking = ThreadPoolExecutor(LOOKING_THREADS, thread_name_prefix="guide")
        self._tokenizers: dict[str, Tokenizer] = {}

    def load(self, progress: Callable[[str], None]) -> None:
        """Load this rank's shard and make the cache. Raises ConfigError for a model that cannot be served."""
        runner = ModelRunner(self._spec, progress)
        config = self._spec.model.inference_engine_config
        self._tokenizer = Tokenizer(self._spec.model, runner.vocabulary, runner.eos_token_ids)
        self._guides = Guides(self._tokenizer)
        self._scheduler: Scheduler[_Sequence] = Scheduler(
            runner.budget,
            config.prefix_sharing and runner.recompute_beyond is None,
            runner.recompute_beyond,
            self._quotas.running,
        )
        self._context = min(runner.context, self._scheduler.allocator.capacity)
        self._runner = runner

    def run(self) -> None:
        """Generate until `close` is called on rank 0; then return on every rank, with the model's memory freed."""
        runner, self._runner = self._runner, None
        assert runner is not None, "load() comes first, and run() once"
        runner.bind_thread()
        try:
            if self._spec.rank == 0:
                self._lead(runner)
            else:
                runner.follow()
        finally:
            runner.close()

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Queue a request. Raises QueueFullError when too many wait."""
        entry = _Request(request, deliver)
        with self._changed:
            if self._closed:
                return
            if request.id in self._requests:
                error = InvalidRequestError(f"a request with the id {request.id} exists already")
                self._tokenising[OWNER].submit(deliver, error)
                return
            self._quotas.enter(request)
            self._requests[request.id] = entry
            line = _LONG if request.size > LONG_BYTES else request.caller[0]
            line = _GUIDED[request.caller[0]] if request.params.structured_outputs else line
            self._tokenising[line].submit(self._tokenise, entry, line)

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its KV cache within a step. Its `deliver` is not called again."""
        with self._changed:
            entry = self._requests.get(request_id)
            if entry is not None:
                self._remove(entry)

    @property
    def context(self) -> int:
        """The bound on prompt plus answer, in tokens."""
        return self._context

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._tokenizer.pretrained

    @property
    def steps(self) -> int:
        """How many steps it has made; grows while requests run."""
        return self._steps

    def stats(self) -> Load:
        """Return the load at this moment: `running` and `waiting` are requests."""
        with self._changed:
            allocator = self._scheduler.allocator
            return Load(
                running=len(self._requests) - self._quotas.waiting,
                waiting=self._quotas.waiting,
                free_blocks=allocator.free,
                total_blocks=allocator.total,
                generated_tokens=self._generated,
                prefix_queries=self._scheduler.prefix_queries,
                prefix_hits=self._scheduler.prefix_hits,
                queue_time=self._queue_time.histogram,
            )

    def close(self) -> None:
        """Make `run` return on every rank, when called on rank 0. Unfinished requests are dropped."""
        with self._changed:
            self._closed = True
            for entry in list(self._requests.values()):
                self._remove(entry)
            self._changed.notify_all()
        for threads in self._tokenising.values():
            threads.shutdown(wait=False, cancel_futures=True)
        self._looking.shutdown(wait=False)

    def _lead(self, runner: ModelRunner) -> None:
        sampling = create_sampling(runner.drawn, self._tokenizer.vocabulary, self._tokenizer.eos_token_ids)
        lag = sampling.lag if runner.runs_ahead else 0
        begun: deque[_Begun] = deque()
        while True:
            step, sequences = self._next_step(wait=not begun)
            if step.stop:
                runner.stop()
                return
            if sequences:
                logits = runner.execute(step)
                _score(logits[len(sequences) :], step, sequences)
                draw = sampling.draw(logits[: len(sequences)], step, [sequence.sampler for sequence in sequences])
                begun.append(_Begun(step, sequences, draw))
            if len(begun) > (lag if sequences else 0):
                self._finish(begun.popleft())

    def _finish(self, begun: _Begun) -> None:
        """Take what a step has drawn, once it is known."""
        drawn, period = begun.draw.wait(), report_period()
        step = begun.step
        pieces = []
        looking: list[Future[Any]] = []
        with self._changed:
            self._steps += 1
            slices = zip(begun.sequences, step.sample.tolist(), drawn.token_ids, strict=True)
            for row, (sequence, samples, token_id) in enumerate(slices):
                sequence.unknown -= samples
                if token_id == NOT_FINITE:
                    self._scheduler.invalidate(step.tables[row])
                if samples and not sequence.answer.ended:
                    piece = self._accept(sequence, token_id, drawn.scores.get(row), period)
                    if piece:
                        pieces.append((sequence.request.deliver, piece))
                    if sequence.guide and not sequence.answer.ended and sequence.request.is_open:
                        looking.append(sequence.guide.look_ahead(self._looking, self._notify))
            # All of them last: the first wakes whoever sends them, who would take the interpreter from this thread.
            for deliver, piece in pieces:
                deliver(piece)
        if looking:
            wait_for(looking, LOOKING_SECONDS)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _next_step(self, wait: bool) -> tuple[Step, list[_Sequence]]:
        """Return what there is to do now, with the sequences of its slices; `wait` until there is something."""
        scheduler = self._scheduler
        with self._changed:
            while True:
                # In this order: a request may have been cancelled between its arrival and now.
                while self._arrived:
                    sequence = self._arrived.popleft()
                    scheduler.add(sequence, first=sequence.request.request.admitted)
                for entry in self._cancelled:
                    scheduler.remove(entry.sequences)
                self._cancelled.clear()
                if self._closed:
                    return Step.of(stop=True), []
                if scheduler.has_work() or not wait:
                    step, sequences = self._schedule()
                    if sequences or not wait or not scheduler.waits:
                        return step, sequences
                self._changed.wait()

    def _schedule(self) -> tuple[Step, list[_Sequence]]:
        step, sequences = self._scheduler.schedule()
        for sequence in sequences:
            if not sequence.request.started:
                sequence.request.started = True
                self._queue_time.add(time.monotonic() - sequence.request.arrived)
                self._quotas.leave(sequence.request.request)
        return step, sequences

    def _accept(
        self, sequence: _Sequence, token_id: int, scored: Scored | None, period: int
    ) -> Response | Exception | None:
        """Add a token to its answer and return what is to be delivered; an error ends this one request alone."""
        entry, answer = sequence.request, sequence.answer
        if not entry.is_open:
            return None
        if token_id == NOT_FINITE:
            self._remove(entry)
            return InvalidRequestError("the model's numbers for this prompt are not finite")
        if not answer.generated:
            answer.tell_of_prompt(sequence.of_prompt)
        logprob, top = scored or (None, ())
        try:
            piece = answer.add(token_id, logprob, token_id in sequence.ends_with, top, period)
        except InvalidRequestError as error:
            self._remove(entry)
            return error
        except Exception as error:  # noqa: BLE001 (whatever a tokenizer does wrong stays with this request)
            _log.exception("request %s failed", entry.request.id)
            self._remove(entry)
            return RequestError(f"the answer cannot be decoded: {error}")
        sequence.tokens.append(token_id)
        self._generated += 1
        if answer.ended:
            self._scheduler.remove([sequence])
            entry.unfinished -= 1
            if not entry.unfinished:
                self._close(entry)
        return piece

    def _tokenise(self, entry: _Request, line: str) -> None:
        try:
            if line not in self._tokenizers:
                self._tokenizers[line] = self._tokenizer if line == OWNER else self._tokenizer.copy()
            sequences = self._sequences(entry, self._tokenizers[line])
        except InvalidRequestError as error:
            self._refuse(entry, error)
        except Exception as error:  # noqa: BLE001 (whatever a tokenizer does wrong stays with this request)
            self._refuse(entry, InvalidRequestError(f"the prompt cannot be tokenised: {error}"))
        else:
            with self._changed:
                if entry.is_open:
                    entry.sequences = sequences
                    entry.unfinished = len(sequences)
                    self._arrived.extend(sequences)
                    self._changed.notify_all()

    def _sequences(self, entry: _Request, encoding: Tokenizer) -> list[_Sequence]:
        """Return a request's answers to be, those that have ended left out. Raises InvalidRequestError if it is bad."""
        request, params, tokenizer = entry.request, entry.request.params, self._tokenizer
        room = min(params.max_length or self._context, self._context)
        token_ids = encoding.encode(request.prompt, not params.add_special_tokens, room)
        ends = tokenizer.ends(params)
        limit = answer_limit(params, len(token_ids), self._context)
        sequences = []
        count = params.num_return_sequences
        guides: list[Guide] = []
        if params.structured_outputs:
            guides = self._guides.make(params.structured_outputs, ends, count)
        for index, so_far in enumerate(request.resume or (ResumedAnswer(),) * count):
            if so_far.ended:
                continue
            guide = guides[index] if guides else None
            # Of a guided answer the grammar says with which spaces it begins.
            before = token_ids if params.return_full_text or guide else ()
            tokens = list(token_ids)
            tokenizer.check(so_far.token_ids)
            answer = Answer(
                params,
                tokenizer.detokenizer(before, params.skip_special_tokens),
                prompt=request.prompt,
                prompt_length=len(token_ids),
                limit=limit,
                index=index,
                guide=guide,
                reports=request.reports,
            )
            ending = (*{*tokenizer.eos_token_ids, *ends},)
            sampler = Sampler(params, tokens, tokenizer.vocabulary, ending, index, guide)
            answer.resume(so_far, ends)
            sampler.skip(len(so_far.token_ids))
            if guide:
                guide.look_ahead(self._looking, self._notify).result()
            tokens += so_far.token_ids
            longest = len(token_ids) + limit
            scores = params.prompt_logprobs and len(token_ids) > 1 and not so_far.token_ids
            sequences.append(_Sequence(entry, tokens, sampler, answer, ends, longest, scores, guide))
        return sequences

    def _refuse(self, entry: _Request, error: InvalidRequestError) -> None:
        with self._changed:
            if entry.is_open:
                self._remove(entry)
                entry.deliver(error)

    def _remove(self, entry: _Request) -> None:
        self._close(entry)
        if not entry.started:
            self._quotas.leave(entry.request)
        self._cancelled.append(entry)
        self._changed.notify_all()

    def _close(self, entry: _Request) -> None:
        del self._requests[entry.request.id]
        entry.is_open = False


@dataclass(eq=False)
class _Request:
    """A request; `started` once it has been in a step, and no more `is_open` once it has ended, however."""

    request: GenerationRequest
    deliver: Deliver
    sequences: Sequence[_Sequence] = ()
    unfinished: int = 0
    started: bool = False
    is_open: bool = True
    arrived: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Sequence:
    """One answer in the making; see Scheduled for the fields that the scheduler knows."""

    request: _Request
    tokens: list[int]
    sampler: Sampler
    answer: Answer
    ends_with: frozenset[int]
    longest: int
    scores: bool
    guide: Guide | None = None
    of_prompt: list[Scored] = field(default_factory=list)
    unknown: int = 0
    table: BlockTable = ()
    computed: int = 0
    registered: int = 0
    slot: int | None = None
    caller: Caller = field(init=False)

    def __post_init__(self) -> None:
        """Note who asks."""
        self.caller = self.request.request.caller

    @property
    def waits(self) -> bool:
        """Whether it is not known yet which tokens its guide allows next."""
        return self.guide is not None and (self.unknown > 0 or not self.guide.is_ready)


@dataclass(frozen=True)
class _Begun:
    """A step that the ranks compute, and whose tokens are being drawn."""

    step: Step
    sequences: list[_Sequence]
    draw: Draw


def _score(logits: torch.Tensor, step: Step, sequences: Sequence[_Sequence]) -> None:
    """Note what the logits say of the prompts' tokens: each row of the token that follows."""
    if not step.scores.any():
        return
    row = 0
    for part, sequence in zip(step.slices, sequences, strict=True):
        if not part.scores:
            continue
        following = sequence.tokens[part.start + 1 : part.start + 1 + part.num_scores]
        rows = logits[row : row + part.num_scores]
        row += part.num_scores
        del sequence.of_prompt[part.start :]  # it was preempted, and begins again
        if following:
            sequence.of_prompt += scores_of(rows, following, sequence.request.request.params.top_logprobs)
        sequence.scores = len(sequence.of_prompt) < len(sequence.tokens) - 1
